/* libnvidia-ml.so.1 without a GPU: it says what the script named by LEMTEST_NVML_SCRIPT says.
 *
 * The script is read anew at every call, so a test changes what every process sees by replacing the file. A line is a
 * word and its values; `#` begins a comment. Lines before the first `gpu` hold for every GPU, later ones for that one.
 *
 *   driver 580.65.06                    count 1                       cuda 13000
 *   origin 123456789000                 the time, in ns of CLOCK_MONOTONIC, from which the script's seconds count
 *   now 123456789000                    time stands still there
 *   gpu 0                               the lines that follow are about this one
 *   name NVIDIA Double                  uuid GPU-…                    capability 9 0          vbios 96.00.00.00.01
 *   memory_total 80000000000            memory_used 2000000000        bytes, what processes hold included
 *   process 1234 5000000 [10 20]        pid and bytes, `-` where the driver does not tell; from one time to another
 *   fail nvmlDeviceGetMemoryInfo 999 [10 20]    this function answers with this error, or `*`, every one about
 *                                       the GPU; nvmlInit is a function too. From one time to another, if told
 *   delay nvmlDeviceGetPowerUsage 0.5 [10 20]   this function takes so many seconds
 *   lost 2.5 15                         from 2.5 s after the script was written on, every call about a GPU fails with
 *                                       15 (GPU is lost), or with another code
 *
 * What it draws, in W, is the sum of these (power.h); without any of these and of its meters it has no meter:
 *   point 0 80                          straight lines from one to the next; two at one time are a step
 *   level 10 400 0.05                   from 10 s on it nears 400 W with this time constant; the first holds before it, too
 *   ripple 10 20 30 10 0.5              from 10 to 20 s: 30 W of 10 Hz, phase 0.5
 *   load /path 80 400 0.05 0.1          idle, busy, time constants of rise and fall: as the file says, to which an engine
 *                                       appends lines `<ns of CLOCK_MONOTONIC> <how busy, 0 to 1>`; instead of levels.
 *                                       A line had better be there before its time has come
 *   load_ripple 30 10 0.5               while it is busy            load_events 0x4          these clock-event bits, too
 * Its meters (sensors.h), each a word and pairs of a key and a number, or `none` where NVML says Not Supported:
 *   counter period 0.1 jitter 0 phase 0 lag 0 resolution 1 offset 1e9 gain 1 seed 0          reset 12.5
 *   instant window 0.025 period 0.1 jitter 0 phase 0 lag 0 quantum 0.001 noise 0 gain 1 seed 0     field 186
 *   average window 1 …                                                            nvmlDeviceGetPowerUsage and field 185
 *   scope module                        only the module is metered: energy and power at scope 1 of fields 191, 185, 186
 * Its state:
 *   temperature 30                      thermal 28 0.08 20          ambient, degrees per W, time constant
 *   events 10 12.5 0x40                 clock-event bits from one time to another
 *   slowdown_counters 0                 how long they lasted is not counted, in no field and by no violation
 *   sm_clock 0 1980                     since when, MHz             memory_clock 2619
 *   utilisation 0 50                    since when, percent; of a load it follows without being told
 *   power_limit 700                     enforced_limit 650          persistence 1            mig 0, 1 or none
 * What can be set, by functions that fail with Not Supported without these:
 *   limit_range 100 700                 W                           clock_range 210 1980     MHz, in steps of 15
 *   settings /path                      a log of every setting: `<ns of CLOCK_MONOTONIC> <pid> <GPU> asked power 250000`
 *                                       when a function is called, the same with `did` when it has taken effect, which is
 *                                       after its delay; also `lock 1005` and `unlock`. What holds is what the log says
 *
 * The variable may name several files, with colons between them, which are read in their order as if they were one; those
 * after the first may be missing. Without a script there is no driver. A line that is not understood is told on stderr, and every call then fails.
 * The structures and numbers are those of NVIDIA's nvml.h, version 12.
 */
#include "script.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { FIELD_ENERGY_OF_GPU = 83, FIELD_POWER_AVERAGE = 185, FIELD_POWER_INSTANT = 186, FIELD_LIMIT = 190, FIELD_ENERGY = 191,
       FIELD_SOFT_THERMAL = 269, FIELD_HARD_THERMAL = 270, FIELD_POWER_BRAKE = 271 };
enum { SCOPE_GPU = 0, SCOPE_MODULE = 1 };
enum { TYPE_UNSIGNED_INT = 1, TYPE_UNSIGNED_LONG_LONG = 3 };
enum { POLICY_THERMAL = 1 };
enum { CLOCK_MEMORY = 2, CLOCKS = 4, CLOCK_STEP = 15, FEATURE_DISABLED = 0, FEATURE_ENABLED = 1 };

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned int version, sensor; int temperature; } TemperatureV1;
typedef struct { unsigned int gpu, memory; } Utilisation;
typedef struct { unsigned long long reference_us, violation_ns; } Violation;
typedef struct {
    char legacy_id[16];
    unsigned int domain, bus, device, device_id, subsystem_id;
    char id[32];
} Pci;
typedef struct {
    unsigned int field, scope;
    long long timestamp, latency_us;
    unsigned int type, code;
    union { double number; unsigned int unsigned_int; unsigned long long unsigned_long_long; } value;
} FieldValue;

static int initialised; /* how often, less shutdowns */

/* The script, or why this function fails. */
static int begin(Script *script, const char *function)
{
    int code = load_script(script);
    return code != SUCCESS ? code : fare(script, function, ANY_GPU);
}

static int begin_initialised(Script *script, const char *function)
{
    return initialised > 0 ? begin(script, function) : UNINITIALIZED;
}

/* A handle is the index and one. */
static void *handle_of(size_t index) { return (void *)(index + 1); }

static int begin_for_gpu(Script *script, const char *function, void *handle, Gpu **gpu)
{
    int code = begin_initialised(script, function);
    size_t index = (size_t)handle - 1;
    if (code != SUCCESS)
        return code;
    if (index >= script->count)
        return INVALID_ARGUMENT;
    *gpu = &script->gpu[index];
    return (*gpu)->lost_code != SUCCESS ? (*gpu)->lost_code : fare(script, function, (int)index);
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
    if (index >= MAX_GPUS)
        return INVALID_ARGUMENT;
    *handle = handle_of(index);
    return begin_for_gpu(&script, __func__, *handle, &gpu);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    Script script;
    Gpu *gpu;
    int code = begin_initialised(&script, __func__);
    if (code != SUCCESS)
        return code;
    *handle = NULL;
    for (unsigned int index = 0; index < script.count; index++)
        if (!strcmp(script.gpu[index].uuid, uuid))
            *handle = handle_of(index);
    return *handle ? begin_for_gpu(&script, __func__, *handle, &gpu) : NOT_FOUND;
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

/* What other tools ask of a GPU before they measure: Hopper, shared by all, without graphics. */
static int give_constant(const char *function, void *handle, unsigned int *out, unsigned int value)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, function, handle, &gpu);
    if (code == SUCCESS)
        *out = value;
    return code;
}

int nvmlDeviceGetArchitecture(void *handle, unsigned int *out) { return give_constant(__func__, handle, out, 9); }

int nvmlDeviceGetComputeMode(void *handle, unsigned int *out) { return give_constant(__func__, handle, out, 0); }

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned int *count, Process *processes)
{
    (void)processes;
    return give_constant(__func__, handle, count, 0);
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
    double at = time_of(&script);
    if (code != SUCCESS)
        return code;
    *count = 0;
    for (unsigned int k = 0; k < gpu->processes; k++)
        if (gpu->process[k].from <= at && at < gpu->process[k].to) {
            if (*count < room)
                processes[*count] = gpu->process[k].process;
            ++*count;
        }
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

/* A counter's value, once told, stays: an engine may have written of a change just after it was asked for. */
static unsigned long long keep_counter(const Script *script, const Gpu *gpu, double tick, unsigned long long value)
{
    static struct { long long origin; double tick, begun; unsigned long long value; } told[MAX_GPUS];
    size_t index = (size_t)(gpu - script->gpu);
    double begun = -INFINITY;
    if (!*gpu->load.path)
        return value;
    for (unsigned int k = 0; k < gpu->counter.resets; k++)
        if (gpu->counter.reset[k] <= tick)
            begun = fmax(begun, gpu->counter.reset[k]);
    if (told[index].origin == script->origin && told[index].begun == begun && told[index].tick <= tick
        && told[index].value > value)
        value = told[index].value;
    told[index].origin = script->origin, told[index].begun = begun;
    told[index].tick = tick, told[index].value = value;
    return value;
}

static int give_energy(const Script *script, const Gpu *gpu, unsigned long long *energy)
{
    double at = time_of(script), busy, tick;
    void *owned;
    if (!gpu->has_power || !gpu->counter.is_there)
        return NOT_SUPPORTED;
    Signal signal = signal_of(script, gpu, at, &busy, &owned);
    *energy = read_counter(&gpu->counter, &signal, at, &tick);
    *energy = keep_counter(script, gpu, tick, *energy);
    free(owned);
    return SUCCESS;
}

static int give_power(const Script *script, const Gpu *gpu, const Sensor *sensor, unsigned int *power)
{
    double at = time_of(script), busy;
    void *owned;
    if (!gpu->has_power || !sensor->is_there)
        return NOT_SUPPORTED;
    Signal signal = signal_of(script, gpu, at, &busy, &owned);
    *power = read_sensor(sensor, &signal, at);
    free(owned);
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *energy)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        code = gpu->is_module ? NOT_SUPPORTED : give_energy(&script, gpu, energy);
    return code;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned int *power)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        code = gpu->is_module ? NOT_SUPPORTED : give_power(&script, gpu, &gpu->average, power);
    return code;
}

static unsigned int limit_of(const Script *script, const Gpu *gpu, int is_enforced)
{
    Settings found = settings_of(gpu, (int)(gpu - script->gpu));
    double limit = found.power_limit > 0 ? found.power_limit : gpu->power_limit;
    if (is_enforced && gpu->enforced_limit > 0)
        limit = found.power_limit > 0 ? fmin(limit, gpu->enforced_limit) : gpu->enforced_limit;
    return (unsigned int)(limit * 1000 + 0.5);
}

/* For how long clock events with one of these bits lasted until now, in ns. */
static unsigned long long slowed_ns(const Script *script, const Gpu *gpu, unsigned long long mask)
{
    double at = time_of(script), total = 0;
    for (unsigned int k = 0; k < gpu->events; k++)
        if (gpu->event[k].mask & mask && gpu->event[k].from < at)
            total += fmin(at, gpu->event[k].to) - fmax(0, gpu->event[k].from);
    return (unsigned long long)(total * 1e9);
}

int nvmlDeviceGetViolationStatus(void *handle, int policy, Violation *violation)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS && (gpu->counts_no_slowdowns || policy != POLICY_THERMAL))
        return NOT_SUPPORTED;
    if (code == SUCCESS)
        *violation = (Violation){(unsigned long long)(time_of(&script) * 1e6), slowed_ns(&script, gpu, 0x60)};
    return code;
}

static int give_field(const Script *script, const Gpu *gpu, FieldValue *field)
{
    unsigned int due = gpu->is_module ? SCOPE_MODULE : SCOPE_GPU;
    field->type = TYPE_UNSIGNED_INT;
    switch (field->field) {
    case FIELD_LIMIT:
        field->value.unsigned_int = limit_of(script, gpu, 1);
        return SUCCESS;
    case FIELD_POWER_AVERAGE:
    case FIELD_POWER_INSTANT:
        return field->scope != due ? NOT_SUPPORTED
            : give_power(script, gpu, field->field == FIELD_POWER_INSTANT ? &gpu->instant : &gpu->average,
                         &field->value.unsigned_int);
    case FIELD_ENERGY_OF_GPU:
    case FIELD_ENERGY:
        field->type = TYPE_UNSIGNED_LONG_LONG;
        return field->scope != due || (gpu->is_module && field->field == FIELD_ENERGY_OF_GPU)
            ? NOT_SUPPORTED : give_energy(script, gpu, &field->value.unsigned_long_long);
    case FIELD_SOFT_THERMAL:
    case FIELD_HARD_THERMAL:
    case FIELD_POWER_BRAKE:
        field->type = TYPE_UNSIGNED_LONG_LONG;
        field->value.unsigned_long_long = slowed_ns(script, gpu, 0x20ULL << (field->field - FIELD_SOFT_THERMAL));
        return gpu->counts_no_slowdowns ? NOT_SUPPORTED : SUCCESS;
    default:
        return NOT_SUPPORTED;
    }
}

/* Each field has its own success; the call as a whole fails only where NVML does not get as far as them. */
int nvmlDeviceGetFieldValues(void *handle, int count, FieldValue *fields)
{
    Script script;
    Gpu *gpu;
    struct timespec now;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code != SUCCESS)
        return code;
    if (count < 1 || !fields)
        return INVALID_ARGUMENT;
    clock_gettime(CLOCK_REALTIME, &now);
    for (int k = 0; k < count; k++) {
        fields[k].timestamp = now.tv_sec * 1000000LL + now.tv_nsec / 1000;
        fields[k].latency_us = 0;
        fields[k].code = (unsigned int)give_field(&script, gpu, &fields[k]);
    }
    return SUCCESS;
}

int nvmlDeviceGetPowerManagementLimit(void *handle, unsigned int *limit)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        *limit = limit_of(&script, gpu, 0);
    return code;
}

int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned int *limit)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        *limit = limit_of(&script, gpu, 1);
    return code;
}

static int read_temperature(const Script *script, const Gpu *gpu)
{
    double at = time_of(script), busy, degrees = gpu->temperature;
    void *owned;
    Signal signal = signal_of(script, gpu, at, &busy, &owned);
    if (gpu->thermal_tau > 0)
        degrees = gpu->ambient + gpu->per_watt * power_smoothed(&signal, at, gpu->thermal_tau);
    free(owned);
    return (int)floor(degrees + 0.5);
}

int nvmlDeviceGetTemperatureV(void *handle, TemperatureV1 *temperature)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code != SUCCESS)
        return code;
    if (temperature->version != (sizeof *temperature | 1U << 24))
        return VERSION_MISMATCH;
    if (temperature->sensor != 0)
        return INVALID_ARGUMENT;
    temperature->temperature = read_temperature(&script, gpu);
    return SUCCESS;
}

/* Deprecated, as the one for the reasons below. */
int nvmlDeviceGetTemperature(void *handle, unsigned int sensor, unsigned int *temperature)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS && sensor != 0)
        return INVALID_ARGUMENT;
    if (code == SUCCESS)
        *temperature = (unsigned int)read_temperature(&script, gpu);
    return code;
}

/* The last value since then; the first holds before it, too. */
static double step_of(const Step *steps, unsigned int count, double at, double without)
{
    double value = count ? steps[0].value : without;
    for (unsigned int k = 0; k < count; k++)
        if (steps[k].at <= at)
            value = steps[k].value;
    return value;
}

static unsigned long long read_reasons(const Script *script, const Gpu *gpu)
{
    unsigned long long reasons;
    double at = time_of(script), busy;
    void *owned;
    signal_of(script, gpu, at, &busy, &owned);
    free(owned);
    reasons = busy > 0 ? gpu->load.events : 0;
    for (unsigned int k = 0; k < gpu->events; k++)
        if (gpu->event[k].from <= at && at < gpu->event[k].to)
            reasons |= gpu->event[k].mask;
    return reasons;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *reasons)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        *reasons = read_reasons(&script, gpu);
    return code;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        *reasons = read_reasons(&script, gpu);
    return code;
}

int nvmlDeviceGetUtilizationRates(void *handle, Utilisation *utilisation)
{
    Script script;
    Gpu *gpu;
    void *owned;
    double at, busy;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code != SUCCESS)
        return code;
    if (gpu->mig == FEATURE_ENABLED) /* as NVML's reference says */
        return NOT_SUPPORTED;
    at = time_of(&script);
    signal_of(&script, gpu, at, &busy, &owned);
    free(owned);
    utilisation->gpu = (unsigned int)floor(step_of(gpu->utilisation, gpu->utilisations, at, 100 * busy) + 0.5);
    utilisation->memory = utilisation->gpu / 2;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(void *handle, unsigned int type, unsigned int *clock)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS && type >= CLOCKS)
        return INVALID_ARGUMENT;
    if (code == SUCCESS) {
        double locked = settings_of(gpu, (int)(gpu - script.gpu)).lock_clock;
        *clock = (unsigned int)(type == CLOCK_MEMORY ? gpu->memory_clock : locked > 0 ? locked
            : step_of(gpu->sm_clock, gpu->sm_clocks, time_of(&script), 1980));
    }
    return code;
}

int nvmlDeviceGetPersistenceMode(void *handle, unsigned int *mode)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        *mode = gpu->persistence ? FEATURE_ENABLED : FEATURE_DISABLED;
    return code;
}

int nvmlDeviceGetMigMode(void *handle, unsigned int *current, unsigned int *pending)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS && gpu->mig == UNKNOWN)
        return NOT_SUPPORTED;
    if (code == SUCCESS)
        *current = *pending = (unsigned int)gpu->mig;
    return code;
}

int nvmlDeviceGetVirtualizationMode(void *handle, unsigned int *mode)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS)
        *mode = 0;
    return code;
}

int nvmlDeviceGetVbiosVersion(void *handle, char *version, unsigned int length)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    return code != SUCCESS ? code : give_text(gpu->vbios, version, length);
}

int nvmlDeviceGetPciInfo_v3(void *handle, Pci *pci)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code != SUCCESS)
        return code;
    memset(pci, 0, sizeof *pci);
    pci->bus = (unsigned int)(gpu - script.gpu) + 1;
    pci->device_id = 0x233510de;
    snprintf(pci->legacy_id, sizeof pci->legacy_id, "0000:%02X:00.0", pci->bus & 0xFF);
    snprintf(pci->id, sizeof pci->id, "00000000:%02X:00.0", pci->bus & 0xFF);
    return SUCCESS;
}

/* Log that a setting is asked for, and that it took effect, once the function's delay is over. */
static int set(const char *function, void *handle, const char *what, double value, double most)
{
    Script script;
    Gpu *gpu;
    int index = (int)((size_t)handle - 1), code = initialised > 0 ? load_script(&script) : UNINITIALIZED;
    if (code != SUCCESS || index < 0 || (unsigned)index >= script.count)
        return code != SUCCESS ? code : INVALID_ARGUMENT;
    log_setting(&script.gpu[index], index, "asked", what, value);
    code = begin_for_gpu(&script, function, handle, &gpu);
    if (code == SUCCESS && (!*gpu->settings || most <= 0))
        return NOT_SUPPORTED;
    if (code == SUCCESS && value > most)
        return INVALID_ARGUMENT;
    if (code == SUCCESS)
        log_setting(gpu, index, "did", what, value);
    return code;
}

static double most_of(void *handle, int is_clock)
{
    Script script;
    size_t index = (size_t)handle - 1;
    if (load_script(&script) != SUCCESS || index >= script.count)
        return 0;
    return is_clock ? script.gpu[index].most_clock : 1000 * script.gpu[index].most_limit;
}

int nvmlDeviceSetPowerManagementLimit(void *handle, unsigned int limit)
{
    return set(__func__, handle, "power", limit, most_of(handle, 0));
}

int nvmlDeviceSetGpuLockedClocks(void *handle, unsigned int least, unsigned int most)
{
    return least != most ? INVALID_ARGUMENT : set(__func__, handle, "lock", most, most_of(handle, 1));
}

int nvmlDeviceResetGpuLockedClocks(void *handle)
{
    return set(__func__, handle, "unlock", 0, most_of(handle, 1));
}

int nvmlDeviceGetPowerManagementLimitConstraints(void *handle, unsigned int *least, unsigned int *most)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS && gpu->most_limit <= 0)
        return NOT_SUPPORTED;
    if (code == SUCCESS)
        *least = (unsigned int)(gpu->least_limit * 1000 + 0.5), *most = (unsigned int)(gpu->most_limit * 1000 + 0.5);
    return code;
}

static int give_clocks(unsigned int *count, unsigned int *clocks, double most, double least)
{
    unsigned int room = *count;
    *count = 0;
    for (double clock = most; clock >= least; clock -= CLOCK_STEP) {
        if (*count < room && clocks)
            clocks[*count] = (unsigned int)clock;
        ++*count;
    }
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetSupportedMemoryClocks(void *handle, unsigned int *count, unsigned int *clocks)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS && gpu->most_clock <= 0)
        return NOT_SUPPORTED;
    return code != SUCCESS ? code : give_clocks(count, clocks, gpu->memory_clock, gpu->memory_clock);
}

int nvmlDeviceGetSupportedGraphicsClocks(void *handle, unsigned int memory_clock, unsigned int *count, unsigned int *clocks)
{
    Script script;
    Gpu *gpu;
    int code = begin_for_gpu(&script, __func__, handle, &gpu);
    if (code == SUCCESS && gpu->most_clock <= 0)
        return NOT_SUPPORTED;
    if (code == SUCCESS && memory_clock != (unsigned int)gpu->memory_clock)
        return NOT_FOUND;
    return code != SUCCESS ? code : give_clocks(count, clocks, gpu->most_clock, gpu->least_clock);
}
