/* What the meters of a GPU publish about its power; sensors.py says the same, to the last millijoule. */
#ifndef SENSORS_H
#define SENSORS_H

#include "power.h"

enum { MAX_RESETS = 8 };

/* Times about a period apart, each off by up to half of the jitter. */
typedef struct { double period, jitter, phase, seed; } Ticks;

typedef struct {
    int is_there;
    Ticks ticks;
    double lag, resolution, offset, gain; /* s, mJ, mJ */
    unsigned int resets;
    double reset[MAX_RESETS];
} Counter;

typedef struct {
    int is_there;
    Ticks ticks;
    double window, lag, quantum, noise, gain; /* s, s, W, W */
} Sensor;

/* Its value in mJ when asked then; `tick` gets the time of which that is, less the lag. */
unsigned long long read_counter(const Counter *counter, const Signal *signal, double at, double *tick);
/* Its value in mW when asked then. */
unsigned int read_sensor(const Sensor *sensor, const Signal *signal, double at);

#endif
