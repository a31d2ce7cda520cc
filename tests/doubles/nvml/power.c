#include "power.h"

#include <math.h>

typedef struct { double power, energy; } Course; /* the energy since the first point or level */

static Course follow_line(const Signal *signal, double at)
{
    Course course = {0, 0};
    if (!signal->points)
        return course;
    course.power = signal->point[0].power;
    if (at < signal->point[0].at) {
        course.energy = course.power * (at - signal->point[0].at);
        return course;
    }
    for (unsigned int k = 0; k < signal->points && signal->point[k].at <= at; k++) {
        const Point *start = &signal->point[k];
        if (k + 1 == signal->points) {
            course.power = start->power;
            course.energy += start->power * (at - start->at);
        } else if (signal->point[k + 1].at > start->at) {
            double since = fmin(at, signal->point[k + 1].at) - start->at;
            double slope = (signal->point[k + 1].power - start->power) / (signal->point[k + 1].at - start->at);
            course.power = start->power + slope * since;
            course.energy += since * (start->power + slope * since / 2);
        }
    }
    return course;
}

static void approach(const Level *level, double since, Course *course)
{
    double decay = level->tau > 0 ? exp(-since / level->tau) : 0, excess = course->power - level->target;
    course->energy += level->target * since + excess * level->tau * (1 - decay);
    course->power = level->target + excess * decay;
}

static Course follow_levels(const Signal *signal, double at)
{
    Course course = {0, 0};
    if (!signal->levels)
        return course;
    course.power = signal->level[0].target;
    if (at < signal->level[0].at)
        course.energy = course.power * (at - signal->level[0].at);
    for (unsigned int k = 0; k < signal->levels && signal->level[k].at <= at; k++) {
        double end = k + 1 < signal->levels ? fmin(at, signal->level[k + 1].at) : at;
        approach(&signal->level[k], end - signal->level[k].at, &course);
    }
    return course;
}

static double ripple_integral(const Ripple *ripple, double at)
{
    double omega = 2 * M_PI * ripple->hz, within = fmin(fmax(at, ripple->from), ripple->to);
    return -ripple->amplitude / omega * cos(omega * within + ripple->phase);
}

double energy_between(const Signal *signal, double from, double to)
{
    double energy = follow_line(signal, to).energy - follow_line(signal, from).energy;
    energy += follow_levels(signal, to).energy - follow_levels(signal, from).energy;
    for (unsigned int k = 0; k < signal->ripples; k++)
        energy += ripple_integral(&signal->ripple[k], to) - ripple_integral(&signal->ripple[k], from);
    return energy;
}

static double smooth_line(const Signal *signal, double at, double tau)
{
    double smoothed = signal->points ? signal->point[0].power : 0;
    for (unsigned int k = 0; k < signal->points && signal->point[k].at < at; k++) {
        const Point *start = &signal->point[k];
        int is_last = k + 1 == signal->points;
        double end = is_last ? INFINITY : signal->point[k + 1].at, since = fmin(at, end) - start->at;
        double slope = is_last || since <= 0 ? 0 : (signal->point[k + 1].power - start->power) / (end - start->at);
        double lagging = start->power - slope * tau;
        if (since > 0)
            smoothed = lagging + slope * since + (smoothed - lagging) * exp(-since / tau);
    }
    return smoothed;
}

static double smooth_levels(const Signal *signal, double at, double tau)
{
    Course course = {signal->levels ? signal->level[0].target : 0, 0};
    double smoothed = course.power;
    for (unsigned int k = 0; k < signal->levels && signal->level[k].at <= at; k++) {
        const Level *level = &signal->level[k];
        double since = (k + 1 < signal->levels ? fmin(at, signal->level[k + 1].at) : at) - level->at;
        /* Equal time constants would need a formula of their own; a millionth apart, this one serves. */
        double own = fabs(level->tau - tau) > 1e-6 * tau ? level->tau : tau * (1 + 1e-6);
        double share = (course.power - level->target) * own / (own - tau);
        double fading = own > 0 ? share * exp(-since / own) : 0;
        smoothed = level->target + fading + (smoothed - level->target - share) * exp(-since / tau);
        approach(level, since, &course);
    }
    return smoothed;
}

double power_smoothed(const Signal *signal, double at, double tau)
{
    return smooth_line(signal, at, tau) + smooth_levels(signal, at, tau);
}
