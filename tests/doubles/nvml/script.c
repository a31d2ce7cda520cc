#define _DEFAULT_SOURCE /* strsep */
#include "script.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MOST_NUMBERS = 8 };

typedef struct {
    char word[TEXT], first[PATH_TEXT];
    const char *rest;             /* what follows the word */
    int count;                    /* of the numbers there; -1 when it is more than numbers */
    double number[MOST_NUMBERS];
} Line;

static int parse_numbers(const char *text, double *numbers)
{
    int count = 0;
    for (;;) {
        char *end;
        double value = strtod(text, &end);
        if (end == text)
            return text[strspn(text, " \t")] ? -1 : count;
        if (count == MOST_NUMBERS || !strchr(" \t", *end))
            return -1;
        numbers[count++] = value;
        text = end;
    }
}

/* Take `key number` pairs in; 0 when one is not understood. */
static int take_pairs(const char *text, size_t count, const char *const *keys, double *const *places)
{
    char key[TEXT];
    double value;
    int length;
    while (sscanf(text, " %95s %lf%n", key, &value, &length) == 2) {
        size_t k = 0;
        while (k < count && strcmp(keys[k], key))
            k++;
        if (k == count)
            return 0;
        *places[k] = value;
        text += length;
    }
    return !text[strspn(text, " \t")];
}

static int take_counter(Counter *counter, const Line *line)
{
    static const char *const keys[] = {"period", "jitter", "phase", "lag", "resolution", "offset", "gain", "seed"};
    double *places[] = {&counter->ticks.period, &counter->ticks.jitter, &counter->ticks.phase, &counter->lag,
        &counter->resolution, &counter->offset, &counter->gain, &counter->ticks.seed};
    counter->is_there = strcmp(line->first, "none") != 0;
    return !counter->is_there
        || (take_pairs(line->rest, 8, keys, places) && counter->ticks.period > 0 && counter->resolution > 0);
}

static int take_sensor(Sensor *sensor, const Line *line)
{
    static const char *const keys[] = {"window", "period", "jitter", "phase", "lag", "quantum", "noise", "gain", "seed"};
    double *places[] = {&sensor->window, &sensor->ticks.period, &sensor->ticks.jitter, &sensor->ticks.phase,
        &sensor->lag, &sensor->quantum, &sensor->noise, &sensor->gain, &sensor->ticks.seed};
    sensor->is_there = strcmp(line->first, "none") != 0;
    return !sensor->is_there || (take_pairs(line->rest, 9, keys, places) && sensor->ticks.period > 0
        && sensor->window > 0 && sensor->quantum > 0);
}

static int take_load(Load *load, const Line *line)
{
    double n[MOST_NUMBERS];
    if (parse_numbers(line->rest + strspn(line->rest, " \t") + strlen(line->first), n) != 4)
        return 0;
    strcpy(load->path, line->first);
    load->idle = n[0], load->busy = n[1], load->rise = n[2], load->fall = n[3];
    return 1;
}

static int take_process(Gpu *gpu, const char *text)
{
    char memory[TEXT] = "-";
    double from = -INFINITY, to = INFINITY;
    unsigned int pid;
    if (gpu->processes == MAX_PROCESSES || sscanf(text, " %u %95s %lf %lf", &pid, memory, &from, &to) < 1)
        return 0;
    gpu->process[gpu->processes].process =
        (Process){pid, *memory == '-' ? NOT_AVAILABLE : strtoull(memory, NULL, 10), ~0U, ~0U};
    gpu->process[gpu->processes].from = from;
    gpu->process[gpu->processes++].to = to;
    return 1;
}

static int take_step(Step *steps, unsigned int *count, const Line *line)
{
    if (*count == MAX_STEPS || line->count != 2)
        return 0;
    steps[(*count)++] = (Step){line->number[0], line->number[1]};
    return 1;
}

/* The words about what a GPU draws and how it is metered; -1 for another word. */
static int take_power(Gpu *gpu, const Line *line)
{
    const char *word = line->word;
    const double *n = line->number;
    if (!strcmp(word, "point"))
        return line->count == 2 && gpu->points < MAX_COURSE && (!gpu->points || gpu->point[gpu->points - 1].at <= n[0])
            && (gpu->point[gpu->points++] = (Point){n[0], n[1]}, 1);
    if (!strcmp(word, "level"))
        return line->count >= 2 && gpu->levels < MAX_COURSE && (!gpu->levels || gpu->level[gpu->levels - 1].at <= n[0])
            && (gpu->level[gpu->levels++] = (Level){n[0], n[1], line->count > 2 ? n[2] : 0}, 1);
    if (!strcmp(word, "ripple"))
        return line->count >= 4 && n[3] > 0 && gpu->ripples < MAX_RIPPLES
            && (gpu->ripple[gpu->ripples++] = (Ripple){n[0], n[1], n[2], n[3], line->count > 4 ? n[4] : 0}, 1);
    if (!strcmp(word, "load"))
        return take_load(&gpu->load, line);
    if (!strcmp(word, "load_ripple"))
        return line->count == 3 && n[1] > 0 && gpu->load.ripples < MAX_RIPPLES
            && (gpu->load.ripple[gpu->load.ripples++] = (Ripple){0, 0, n[0], n[1], n[2]}, 1);
    if (!strcmp(word, "load_events"))
        return line->count == 1 && (gpu->load.events = (unsigned long long)n[0], 1);
    if (!strcmp(word, "counter"))
        return take_counter(&gpu->counter, line);
    if (!strcmp(word, "reset"))
        return line->count == 1 && gpu->counter.resets < MAX_RESETS
            && (gpu->counter.reset[gpu->counter.resets++] = n[0], 1);
    if (!strcmp(word, "instant"))
        return take_sensor(&gpu->instant, line);
    if (!strcmp(word, "average"))
        return take_sensor(&gpu->average, line);
    return UNKNOWN;
}

/* The words about the state of a GPU; -1 for another word. */
static int take_state(Gpu *gpu, const Line *line)
{
    const char *word = line->word;
    const double *n = line->number;
    if (!strcmp(word, "temperature"))
        return line->count == 1 && (gpu->temperature = n[0], 1);
    if (!strcmp(word, "thermal"))
        return line->count == 3 && (gpu->ambient = n[0], gpu->per_watt = n[1], gpu->thermal_tau = n[2], 1);
    if (!strcmp(word, "events")) {
        if (line->count != 3 || gpu->events == MAX_STEPS)
            return 0;
        gpu->event[gpu->events].from = n[0], gpu->event[gpu->events].to = n[1];
        gpu->event[gpu->events++].mask = (unsigned long long)n[2];
        return 1;
    }
    if (!strcmp(word, "slowdown_counters"))
        return line->count == 1 && (gpu->counts_no_slowdowns = n[0] == 0, 1);
    if (!strcmp(word, "sm_clock"))
        return take_step(gpu->sm_clock, &gpu->sm_clocks, line);
    if (!strcmp(word, "utilisation"))
        return take_step(gpu->utilisation, &gpu->utilisations, line);
    if (!strcmp(word, "memory_clock"))
        return line->count == 1 && (gpu->memory_clock = n[0], 1);
    if (!strcmp(word, "power_limit"))
        return line->count == 1 && (gpu->power_limit = n[0], 1);
    if (!strcmp(word, "enforced_limit"))
        return line->count == 1 && (gpu->enforced_limit = n[0], 1);
    if (!strcmp(word, "limit_range"))
        return line->count == 2 && (gpu->least_limit = n[0], gpu->most_limit = n[1], 1);
    if (!strcmp(word, "clock_range"))
        return line->count == 2 && (gpu->least_clock = n[0], gpu->most_clock = n[1], 1);
    if (!strcmp(word, "settings"))
        return strcpy(gpu->settings, line->first), 1;
    if (!strcmp(word, "persistence"))
        return line->count == 1 && (gpu->persistence = n[0] != 0, 1);
    if (!strcmp(word, "mig"))
        return gpu->mig = strcmp(line->first, "none") ? atoi(line->first) != 0 : UNKNOWN, 1;
    return UNKNOWN;
}

/* The words about what a GPU is; 0 for another word. */
static int take_identity(Gpu *gpu, const Line *line, double age_s)
{
    const char *word = line->word;
    if (!strcmp(word, "name"))
        snprintf(gpu->name, TEXT, "%.90s", line->rest + strspn(line->rest, " \t"));
    else if (!strcmp(word, "uuid"))
        snprintf(gpu->uuid, TEXT, "%.90s", line->first);
    else if (!strcmp(word, "vbios"))
        snprintf(gpu->vbios, TEXT, "%.90s", line->first);
    else if (!strcmp(word, "capability"))
        gpu->major = (int)line->number[0], gpu->minor = (int)line->number[1];
    else if (!strcmp(word, "memory_total"))
        gpu->total = strtoull(line->first, NULL, 10);
    else if (!strcmp(word, "memory_used"))
        gpu->used = strtoull(line->first, NULL, 10);
    else if (!strcmp(word, "process"))
        return take_process(gpu, line->rest);
    else if (!strcmp(word, "scope"))
        return gpu->is_module = !strcmp(line->first, "module"), gpu->is_module || !strcmp(line->first, "gpu");
    else if (!strcmp(word, "lost"))
        gpu->lost_code = age_s < line->number[0] ? SUCCESS : line->count > 1 ? (int)line->number[1] : GPU_IS_LOST;
    else
        return 0;
    return 1;
}

static int take_about_gpu(Gpu *gpu, const Line *line, double age_s)
{
    int taken = take_power(gpu, line);
    if (taken != UNKNOWN)
        return gpu->has_power = 1, taken;
    taken = take_state(gpu, line);
    return taken != UNKNOWN ? taken : take_identity(gpu, line, age_s);
}

static int take_failure(Script *script, const Line *line, int chosen, int is_delay)
{
    double value, from = -INFINITY, to = INFINITY;
    char function[TEXT];
    if (script->failures == MAX_FAILURES || sscanf(line->rest, " %95s %lf %lf %lf", function, &value, &from, &to) < 2)
        return 0;
    strcpy(script->failure[script->failures].function, function);
    script->failure[script->failures].gpu = chosen;
    script->failure[script->failures].code = is_delay ? SUCCESS : (int)value;
    script->failure[script->failures].delay = is_delay ? value : 0;
    script->failure[script->failures].from = from;
    script->failure[script->failures++].to = to;
    return 1;
}

/* Take a line in; 0 when it is not understood. `chosen` is the GPU it is about. */
static int take(Script *script, char *text, int *chosen)
{
    Line line = {0};
    int length = 0, is_understood = 1;
    text[strcspn(text, "#\r\n")] = 0;
    if (sscanf(text, " %95s%n %255s", line.word, &length, line.first) < 1)
        return 1;
    line.rest = text + length;
    line.count = parse_numbers(line.rest, line.number);
    if (!strcmp(line.word, "driver"))
        return snprintf(script->driver, TEXT, "%.90s", line.first), 1;
    if (!strcmp(line.word, "cuda"))
        return script->cuda = atoi(line.first), 1;
    if (!strcmp(line.word, "origin"))
        return script->origin = atoll(line.first), 1;
    if (!strcmp(line.word, "now"))
        return script->now = atoll(line.first), 1;
    if (!strcmp(line.word, "count"))
        return script->count = (unsigned)atoi(line.first), script->count <= MAX_GPUS;
    if (!strcmp(line.word, "gpu"))
        return *chosen = atoi(line.first), *chosen >= 0 && *chosen < MAX_GPUS;
    if (!strcmp(line.word, "fail") || !strcmp(line.word, "delay"))
        return take_failure(script, &line, *chosen, !strcmp(line.word, "delay"));
    for (int index = 0; index < MAX_GPUS; index++)
        if (*chosen == ANY_GPU || *chosen == index)
            is_understood = is_understood && take_about_gpu(&script->gpu[index], &line, script->age_s);
    return is_understood;
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
        strcpy(gpu->vbios, "96.00.00.00.01");
        gpu->major = 9;
        gpu->total = 80000000000ULL;
        gpu->temperature = 30;
        gpu->power_limit = 700;
        gpu->memory_clock = 2619;
        gpu->persistence = 1;
        gpu->counter = (Counter){.is_there = 1, .ticks = {.period = 0.1}, .resolution = 1, .offset = 1e9, .gain = 1};
        gpu->instant = (Sensor){.is_there = 1, .ticks = {.period = 0.1}, .window = 0.025, .quantum = 0.001, .gain = 1};
        gpu->average = (Sensor){.is_there = 1, .ticks = {.period = 0.1}, .window = 1, .quantum = 0.001, .gain = 1};
    }
}

static int read_script(Script *script, const char *path, int is_due)
{
    FILE *file = fopen(path, "re");
    struct stat status;
    struct timespec now;
    char line[LINE];
    int chosen = ANY_GPU, code = SUCCESS;
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

int load_script(Script *script)
{
    const char *paths = getenv("LEMTEST_NVML_SCRIPT");
    char copy[4096], *rest = copy, *path;
    int code = SUCCESS, is_first = 1;
    set_usual(script);
    if (!paths || !*paths || strlen(paths) >= sizeof copy)
        return DRIVER_NOT_LOADED;
    strcpy(copy, paths);
    while (code == SUCCESS && (path = strsep(&rest, ":"))) {
        code = read_script(script, path, is_first);
        is_first = 0;
    }
    return code;
}

double time_of(const Script *script)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)((script->now ? script->now : now.tv_sec * 1000000000LL + now.tv_nsec) - script->origin) / 1e9;
}

/* Whether a function of the script is this one, with or without the version at its end; `*` is every one. */
static int is_named(const char *written, const char *function)
{
    size_t length = strlen(written);
    if (!strcmp(written, "*"))
        return 1;
    return !strncmp(written, function, length) && (!function[length] || !strncmp(function + length, "_v", 2));
}

int fare(const Script *script, const char *function, int gpu)
{
    double at = time_of(script);
    for (unsigned int k = 0; k < script->failures; k++) {
        double delay = script->failure[k].delay;
        struct timespec pause = {(time_t)delay, (long)((delay - floor(delay)) * 1e9)};
        if (script->failure[k].gpu != gpu || !is_named(script->failure[k].function, function)
            || at < script->failure[k].from || at >= script->failure[k].to)
            continue;
        if (script->failure[k].code != SUCCESS)
            return script->failure[k].code;
        nanosleep(&pause, NULL);
    }
    return SUCCESS;
}

static char *read_text(const char *path)
{
    FILE *file = fopen(path, "re");
    struct stat status;
    char *text = NULL;
    if (file && !fstat(fileno(file), &status) && (text = malloc((size_t)status.st_size + 1)))
        text[fread(text, 1, (size_t)status.st_size, file)] = 0;
    if (file)
        fclose(file);
    return text;
}

Settings settings_of(const Gpu *gpu, int index)
{
    Settings found = {0, 0};
    char *text = *gpu->settings ? read_text(gpu->settings) : NULL, *rest = text, *line;
    while (rest && (line = strsep(&rest, "\n"))) {
        int of;
        char when[TEXT], what[TEXT];
        double value = 0;
        if (sscanf(line, "%*s %*s %d %95s %95s %lf", &of, when, what, &value) < 3 || of != index || strcmp(when, "did"))
            continue;
        if (!strcmp(what, "power"))
            found.power_limit = value / 1000;
        else
            found.lock_clock = value;
    }
    free(text);
    return found;
}

void log_setting(const Gpu *gpu, int index, const char *when, const char *what, double value)
{
    struct timespec now;
    FILE *file = *gpu->settings ? fopen(gpu->settings, "ae") : NULL;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (!file)
        return;
    fprintf(file, "%lld %d %d %s %s", now.tv_sec * 1000000000LL + now.tv_nsec, (int)getpid(), index, when, what);
    fprintf(file, value > 0 ? " %.0f\n" : "\n", value);
    fclose(file);
}

Signal signal_of(const Script *script, const Gpu *gpu, double at, double *busy, void **owned)
{
    Signal signal = {gpu->point, gpu->level, gpu->ripple, gpu->points, gpu->levels, gpu->ripples};
    const Load *load = &gpu->load;
    char *text = *load->path ? read_text(load->path) : NULL, *rest = text, *line;
    unsigned int lines = 0, begun = gpu->ripples;
    double state = 0;
    Level *level;
    Ripple *ripple;
    *busy = 0;
    *owned = NULL;
    if (!*load->path)
        return signal;
    for (const char *c = text; c && *c; c++)
        lines += *c == '\n';
    *owned = malloc((lines + 1) * sizeof *level + (gpu->ripples + lines * load->ripples) * sizeof *ripple);
    if (!*owned)
        abort();
    level = *owned, ripple = (Ripple *)(level + lines + 1);
    memcpy(ripple, gpu->ripple, gpu->ripples * sizeof *ripple);
    signal.level = level, signal.ripple = ripple, signal.levels = 1;
    level[0] = (Level){0, load->idle, 0};
    while (lines-- && (line = strsep(&rest, "\n"))) {
        long long ns;
        double next;
        if (sscanf(line, "%lld %lf", &ns, &next) != 2 || next == state)
            continue;
        double since = (double)(ns - script->origin) / 1e9;
        if (signal.levels == 1)
            level[0].at = since;
        level[signal.levels++] =
            (Level){since, load->idle + next * (load->busy - load->idle), next > state ? load->rise : load->fall};
        for (; begun < signal.ripples; begun++) /* those of the state before end here */
            ripple[begun].to = since;
        for (unsigned int k = 0; next > 0 && k < load->ripples; k++)
            ripple[signal.ripples++] = (Ripple){since, INFINITY, next * load->ripple[k].amplitude, load->ripple[k].hz,
                load->ripple[k].phase};
        *busy = since <= at ? next : *busy;
        state = next;
    }
    free(text);
    return signal;
}
