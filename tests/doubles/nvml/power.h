/* The power that a GPU truly draws, as sums whose integrals are exact; power.py does the same sums. */
#ifndef POWER_H
#define POWER_H

typedef struct { double at, power; } Point;           /* straight lines from one to the next */
typedef struct { double at, target, tau; } Level;     /* from then on it nears the target */
typedef struct { double from, to, amplitude, hz, phase; } Ripple;

/* The sum of the three, in W over seconds since the script's origin. */
typedef struct {
    const Point *point;
    const Level *level;
    const Ripple *ripple;
    unsigned int points, levels, ripples;
} Signal;

double energy_between(const Signal *signal, double from, double to);
/* As something slow of first order sees it, which does not see the ripples. */
double power_smoothed(const Signal *signal, double at, double tau);

#endif
