/*
 * The resolver's thread goes where the threads are that it answers.
 *
 * Waking a thread on another core, which may have to be woken itself, costs several times what
 * answering does.  A thread that faults and is bound to one core is met there, as long as all that
 * are seen are bound to the same one, and as the resolver may run there at all.
 */
#define _GNU_SOURCE
#include <sched.h>

#include "native.h"

#define INTERVAL 64        /* faults between two looks at where their thread may run */
#define APART_NS 500000000 /* for so long, threads bound to different cores are not followed */

/* Of the thread that calls; only resolvers do. */
static _Thread_local struct {
    cpu_set_t allowed; /* where it may run when it follows nobody */
    uint64_t apart;    /* until when it follows nobody, CLOCK_MONOTONIC ns */
    int core;          /* where it is by now; -1: anywhere */
    int known;
} here;

/* The only core on which a thread may run, or -1. */
static int bound_to(pid_t thread)
{
    cpu_set_t cores;

    if (sched_getaffinity(thread, sizeof(cores), &cores) || CPU_COUNT(&cores) != 1)
        return -1;
    for (int core = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &cores))
            return core;
    return -1;
}

static void run_on(int core)
{
    cpu_set_t one;

    CPU_ZERO(&one);
    if (core >= 0)
        CPU_SET(core, &one);
    if (sched_setaffinity(0, sizeof(one), core >= 0 ? &one : &here.allowed) == 0)
        here.core = core;
}

/* One of the `count` threads whose faults have just been read is `thread`, 0 if that is not known. */
void uffdaemon_follow(struct uffdaemon_port *port, pid_t thread, size_t count, uint64_t now)
{
    uint64_t before = port->faults;
    int core;

    port->faults += count;
    if (!thread || (before && before / INTERVAL == port->faults / INTERVAL) || now < here.apart)
        return;
    if (!here.known) {
        if (sched_getaffinity(0, sizeof(here.allowed), &here.allowed))
            return;
        here.known = 1;
        here.core = -1;
    }
    core = bound_to(thread);
    if (core >= 0 && !CPU_ISSET(core, &here.allowed))
        core = -1;
    if (core == here.core)
        return;
    if (here.core >= 0) {
        /* Somebody else, somewhere else: to be between them is better than to go to and fro. */
        here.apart = now + APART_NS;
        core = -1;
    }
    run_on(core);
}
