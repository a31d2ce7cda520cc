/* The script: what nvml.c answers, as the files named by LEMTEST_NVML_SCRIPT say it now. See nvml.c for its words. */
#ifndef SCRIPT_H
#define SCRIPT_H

#include "sensors.h"

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, VERSION_MISMATCH = 25 };
enum { MAX_GPUS = 8, MAX_PROCESSES = 32, MAX_FAILURES = 32, MAX_COURSE = 192, MAX_STEPS = 32, MAX_RIPPLES = 16,
       TEXT = 96, PATH_TEXT = 256, LINE = 512 };
enum { ANY_GPU = -1, UNKNOWN = -1 };
#define NOT_AVAILABLE (~0ULL)

typedef struct { unsigned int pid; unsigned long long memory; unsigned int instance, compute_instance; } Process;
typedef struct { double at, value; } Step; /* the value since then */

typedef struct {
    char path[PATH_TEXT]; /* empty without a load */
    double idle, busy, rise, fall;
    unsigned int ripples;
    Ripple ripple[MAX_RIPPLES];
    unsigned long long events;
} Load;

typedef struct {
    char name[TEXT], uuid[TEXT], vbios[TEXT];
    int major, minor;
    unsigned long long total, used;
    unsigned int processes, points, levels, ripples, events, sm_clocks, utilisations;
    struct { Process process; double from, to; } process[MAX_PROCESSES];
    Point point[MAX_COURSE];
    Level level[MAX_COURSE];
    Ripple ripple[MAX_RIPPLES];
    struct { double from, to; unsigned long long mask; } event[MAX_STEPS];
    Step sm_clock[MAX_STEPS], utilisation[MAX_STEPS];
    Load load;
    Counter counter;
    Sensor instant, average;
    int has_power, is_module, counts_no_slowdowns, persistence, mig; /* mig: UNKNOWN where it is not supported */
    double ambient, per_watt, thermal_tau, temperature; /* tau 0: the temperature is constant */
    double power_limit, enforced_limit, memory_clock;   /* enforced 0: as the other */
    int lost_code;                                      /* SUCCESS while it is there */
    double least_limit, most_limit, least_clock, most_clock; /* most 0: cannot be set */
    char settings[PATH_TEXT];                           /* the log of what was set; empty without one */
} Gpu;

typedef struct { double power_limit, lock_clock; } Settings; /* in W and MHz; 0: not set */

typedef struct {
    char driver[TEXT];
    int cuda;
    unsigned int count;
    long long origin, now; /* ns of CLOCK_MONOTONIC; now 0: as the clock says */
    Gpu gpu[MAX_GPUS];
    unsigned int failures;
    /* With a delay and SUCCESS, the function only takes that long. */
    struct { char function[TEXT]; int code, gpu; double from, to, delay; } failure[MAX_FAILURES];
    double age_s; /* of the file that is being read */
} Script;

/* Read it; SUCCESS or why there is none. */
int load_script(Script *script);
/* Seconds since its origin. */
double time_of(const Script *script);
/* How this function fares now, for that GPU or for ANY_GPU, after the delay it has. */
int fare(const Script *script, const char *function, int gpu);

/* What its log says that holds now. */
Settings settings_of(const Gpu *gpu, int index);
void log_setting(const Gpu *gpu, int index, const char *when, const char *what, double value);

/* What the GPU draws by now, and how busy its engine is (0 without one). What `owned` gets is for free(). */
Signal signal_of(const Script *script, const Gpu *gpu, double at, double *busy, void **owned);

#endif
