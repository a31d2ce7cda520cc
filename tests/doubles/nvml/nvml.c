/* libnvidia-ml.so.1 without a GPU: it says what the script named by LEMTEST_NVML_SCRIPT says.
 *
 * The script is read anew at every call, so a test changes what every process sees by replacing the file. A line is a
 * word and its values; `#` begins a comment. Lines before the first `gpu` hold for every GPU, later ones for that one.
 *
 *   driver 580.65.06                    count 1                       cuda 13000
 *   gpu 0                               the lines that follow are about this one
 *   name NVIDIA Double                  uuid GPU-…                    capability 9 0
 *   memory_total 80000000000            memory_used 2000000000        bytes, what processes hold included
 *   process 1234 5000000                pid and bytes; `-` for bytes where the driver does not tell
 *   fail nvmlDeviceGetMemoryInfo 999    this function answers with this error; nvmlInit is a function too
 *   lost 2.5 15                         from 2.5 s after the script was written on, every call about a GPU fails with
 *                                       15 (GPU is lost), or with another code
 *
 * The variable may name several files, with colons between them, which are read in their order as if they were one; those
 * after the first may be missing. Without a script there is no driver. A line that is not understood is told on stderr, and every call then fails.
 * The structures and numbers are those of NVIDIA's nvml.h, version 12.
 */
#define _DEFAULT_SOURCE /* strsep */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, VERSION_MISMATCH = 25 };
enum { MAX_GPUS = 8, MAX_PROCESSES = 32, MAX_FAILURES = 16, TEXT = 96 };
#define NOT_AVAILABLE (~0ULL)

typedef struct { unsigned int pid; unsigned long long memory; unsigned int instance, compute_instance; } Process;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } MemoryV2;

typedef struct {
    char name[TEXT], uuid[TEXT];
    int major, minor;
    unsigned long long total, used;
    unsigned int processes;
    Process process[MAX_PROCESSES];
    int lost_code; /* SUCCESS while it is there */
} Gpu;

typedef struct {
    char driver[TEXT];
    int cuda;
    unsigned int count;
    Gpu gpu[MAX_GPUS];
    unsigned int failures;
    struct { char function[TEXT]; int code; } failure[MAX_FAILURES];
    double age_s; /* of the file that is being read */
} Script;

static int initialised; /* how often, less shutdowns */

/* Take a line in; 0 when it is not understood. `chosen` is the GPU it is about, -1 for all. */
static int take(Script *script, char *line, int *chosen)
{
    char word[TEXT] = "", first[TEXT] = "", rest[TEXT] = "";
    line[strcspn(line, "#\r\n")] = 0;
    if (sscanf(line, " %95s %95s %95[^\n]", word, first, rest) < 1)
        return 1;
    if (!strcmp(word, "driver"))
        return strcpy(script->driver, first), 1;
    if (!strcmp(word, "cuda"))
        return script->cuda = atoi(first), 1;
    if (!strcmp(word, "count"))
        return script->count = (unsigned)atoi(first), script->count <= MAX_GPUS;
    if (!strcmp(word, "gpu"))
        return *chosen = atoi(first), *chosen >= 0 && *chosen < MAX_GPUS;
    if (!strcmp(word, "fail")) {
        if (script->failures == MAX_FAILURES || !*rest)
            return 0;
        strcpy(script->failure[script->failures].function, first);
        script->failure[script->failures++].code = atoi(rest);
        return 1;
    }
    for (int index = 0; index < MAX_GPUS; index++) {
        Gpu *gpu = &script->gpu[index];
        if (*chosen >= 0 && *chosen != index)
            continue;
        if (!strcmp(word, "name"))
            snprintf(gpu->name, TEXT, "%.40s%s%.50s", first, *rest ? " " : "", rest);
        else if (!strcmp(word, "uuid"))
            strcpy(gpu->uuid, first);
        else if (!strcmp(word, "capability"))
            gpu->major = atoi(first), gpu->minor = atoi(rest);
        else if (!strcmp(word, "memory_total"))
            gpu->total = strtoull(first, NULL, 10);
        else if (!strcmp(word, "memory_used"))
            gpu->used = strtoull(first, NULL, 10);
        else if (!strcmp(word, "process") && gpu->processes < MAX_PROCESSES)
            gpu->process[gpu->processes++] = (Process){(unsigned)atoi(first),
                *rest && *rest != '-' ? strtoull(rest, NULL, 10) : NOT_AVAILABLE, ~0U, ~0U};
        else if (!strcmp(word, "lost"))
            gpu->lost_code = script->age_s < atof(first) ? SUCCESS : *rest ? atoi(rest) : GPU_IS_LOST;
        else
            return 0;
    }
    return 1;
}

static void set_usual(Script *script)
{
    memset(script, 0, sizeof *script);
    strcpy(script->driver, "580.65.06");
    script->cuda = 13000;
    script->count = 1;
    for (int index = 0; index < MAX_GPUS; index++) {
        Gpu *gpu = &script->gpu[index];
        strcpy(gpu->name, "NVIDIA Double");
        snprintf(gpu->uuid, TEXT, "GPU-00000000-0000-4000-8000-%012d", index);
        gpu->major = 9;
        gpu->total = 80000000000ULL;
    }
}

static int read_file(Script *script, const char *path, int is_due)
{
    FILE *file = fopen(path, "r");
    struct stat status;
    struct timespec now;
    char line[512];
    int chosen = -1, code = SUCCESS;
    if (!file)
        return is_due ? DRIVER_NOT_LOADED : SUCCESS;
    fstat(fileno(file), &status);
    clock_gettime(CLOCK_REALTIME, &now);
    script->age_s = (double)(now.tv_sec - status.st_mtim.tv_sec) + (now.tv_nsec - status.st_mtim.tv_nsec) / 1e9;
    while (fgets(line, sizeof line, file)) {
        char copy[sizeof line];
        strcpy(copy, line);
        if (!take(script, line, &chosen)) {
            fprintf(stderr, "%s: not understood: %s", path, copy);
            code = INVALID_ARGUMENT;
        }
    }
    fclose(file);
    return code;
}

static int load(Script *script)
{
    const char *paths = getenv("LEMTEST_NVML_SCRIPT");
    char copy[4096], *rest = copy, *path;
    int code = SUCCESS, is_first = 1;
    set_usual(script);
    if (!paths || !*paths || strlen(paths) >= sizeof copy)
        return DRIVER_NOT_LOADED;
    strcpy(copy, paths);
    while (code == SUCCESS && (path = strsep(&rest, ":"))) {
        code = read_file(script, path, is_first);
        is_first = 0;
    }
    return code;
}

/* Whether a function of the script is this one, with or without the version at its end. */
static int is_named(const char *written, const char *function)
{
    size_t length = strlen(written);
    return !strncmp(written, function, length) && (!function[length] || !strncmp(function + length, "_v", 2));
}

/* The script, or why this function fails. */
static int begin(Script *script, const char *function)
{
    int code = load(script);
    if (code != SUCCESS)
        return code;
    for (unsigned int index = 0; index < script->failures; index++)
        if (is_named(script->failure[index].function, function))
            return script->failure[index].code;
    return SUCCESS;
}

static int begin_initialised(Script *script, const char *function)
{
    return initialised > 0 ? begin(script, function) : UNINITIALIZED;
}

/* A handle is the index and one. */
static int begin_for_gpu(Script *script, const char *function, void *handle, Gpu **gpu)
{
    int code = begin_initialised(script, function);
    size_t index = (size_t)handle - 1;
    if (code != SUCCESS)
        return code;
    if (index >= script->count)
        return INVALID_ARGUMENT;
    *gpu = &script->gpu[index];
    return (*gpu)->lost_code;
}

static int give_text(const char *text, char *out, unsigned int length)
{
    if (strlen(text) >= length)
        return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags)
{
    Script script;
    int code = begin(&script, "nvmlInit");
    (void)flags;
    if (code == SUCCESS)
        initialised++;
    return code;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void)
{
    if (initialised <= 0)
        return UNINITIALIZED;
    initialised--;
    return SUCCESS;
}

const char *nvmlErrorString(int code)
{
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case 10: return "Timeout";
    case 12: return "NVML Shared Library Not Found";
    case 13: return "Function Not Found";
    case GPU_IS_LOST: return "GPU is lost";
    case VERSION_MISMATCH: return "Argument Version Mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    Script script;
    int code = begin_initialised(&script, __func__);
    return code != SUCCESS ? code : give_text(script.driver, version, length);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    Script script;
    int code = begin_initialised(&script, __func__);
    if (code == SUCCESS)
        *version = script.cuda;
    return code;
}

int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

int nvmlDeviceGetCount_v2(unsigned int *count)
{
    Script script;
    int code = begin_initialised(&script, __func__);
    if (code == SUCCESS)
        *count = script.count;
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle)
{
    Script script;
    Gpu *gpu;
    *handle = (void *)((size_t)index + 1);
    return begin_for_gpu(&script, __func__, *handle, &gpu);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    Script script;
    Gpu *gpu;
    int code = begin_initialised(&script, __func__);
    if (code != SUCCESS)
        return code;
    for (unsigned int index = 0; index < script.count; index++)
        if (!strcmp(script.gpu[index].uuid, uuid)) {
            *handle = (void *)((size_t)index + 1);
            return begin_for_gpu(&script, __func__, *handle, &gpu);
        }
    return NOT_FOUND;
}

int nvmlDeviceGetIndex(void *handle, unsigned int *index)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        *index = (unsigned)(gpu - script.gpu);
    return code;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned int length)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    return code != SUCCESS ? code : give_text(gpu->name, name, length);
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned int length)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    return code != SUCCESS ? code : give_text(gpu->uuid, uuid, length);
}

int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        *major = gpu->major, *minor = gpu->minor;
    return code;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        *memory = (Memory){gpu->total, gpu->total - gpu->used, gpu->used};
    return code;
}

int nvmlDeviceGetMemoryInfo_v2(void *handle, MemoryV2 *memory)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS && memory->version != (sizeof *memory | 2U << 24))
        return VERSION_MISMATCH;
    if (code == SUCCESS)
        *memory = (MemoryV2){memory->version, gpu->total, 0, gpu->total - gpu->used, gpu->used};
    return code;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned int *count, Process *processes)
{
    Script script;
    Gpu *gpu;
    unsigned int room = *count;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code != SUCCESS)
        return code;
    *count = gpu->processes;
    if (gpu->processes > room)
        return INSUFFICIENT_SIZE;
    if (gpu->processes)
        memcpy(processes, gpu->process, gpu->processes * sizeof *processes);
    return SUCCESS;
}
