#include "sensors.h"

#include <math.h>
#include <stdint.h>

/* A number from 0 to 1 that follows from the two: the mixing function of splitmix64 (Steele et al., 2014). */
static double uniform(double seed, int64_t number)
{
    uint64_t mixed = (uint64_t)(int64_t)seed * 0xD1B54A32D192ED03u + (uint64_t)(number + 1) * 0x9E3779B97F4A7C15u;
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
    return (double)((mixed ^ mixed >> 31) >> 11) * 0x1p-53;
}

static double tick_time(const Ticks *ticks, int64_t number)
{
    return ticks->phase + (double)number * ticks->period + ticks->jitter * (uniform(ticks->seed, number) - 0.5);
}

static int64_t last_tick(const Ticks *ticks, double at)
{
    int64_t number = (int64_t)floor((at - ticks->phase + ticks->jitter / 2) / ticks->period);
    while (tick_time(ticks, number) > at)
        number--;
    return number;
}

unsigned long long read_counter(const Counter *counter, const Signal *signal, double at, double *tick)
{
    double begun_at = 0, begun = counter->offset, energy;
    int is_reset = 0;
    *tick = tick_time(&counter->ticks, last_tick(&counter->ticks, at)) - counter->lag;
    for (unsigned int k = 0; k < counter->resets; k++)
        if (counter->reset[k] <= at && (!is_reset || counter->reset[k] > begun_at))
            is_reset = 1, begun_at = counter->reset[k], begun = 0;
    if (is_reset && *tick < begun_at)
        return 0;
    energy = begun + 1000.0 * counter->gain * energy_between(signal, begun_at, *tick);
    energy = floor(energy / counter->resolution) * counter->resolution;
    return energy > 0 ? (unsigned long long)energy : 0;
}

unsigned int read_sensor(const Sensor *sensor, const Signal *signal, double at)
{
    int64_t number = last_tick(&sensor->ticks, at);
    double end = tick_time(&sensor->ticks, number) - sensor->lag;
    double mean = energy_between(signal, end - sensor->window, end) / sensor->window;
    double noise = sensor->noise * (2 * uniform(sensor->ticks.seed + 1, number) - 1);
    double power = floor((sensor->gain * mean + noise) / sensor->quantum + 0.5) * sensor->quantum;
    return power > 0 ? (unsigned int)floor(power * 1000 + 0.5) : 0;
}
