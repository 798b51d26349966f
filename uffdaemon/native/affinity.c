/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs the resolver's thread on the core of the threads whose faults it resolves.
 *
 * Waking a thread on another core, which may be idle itself, takes several times as long as
 * resolving its fault.  If faulting threads are bound to one core, all to the same one, the
 * resolver moves there, provided that it may run there.  For a userfaultfd without
 * Features.THREAD_ID the core is found by trying: from another core a fault arrives after dozens of
 * empty reads, on the same one after one.
 */
#define _GNU_SOURCE
#include "affinity.h"

#include <sched.h>

#include "base.h"

#define INTERVAL 64        /* faults between two checks of their thread's affinity */
#define APART_NS 500000000 /* how long not to follow threads bound to different cores */
#define WINDOW 64          /* faults between two assessments of a core */
#define FAR 8              /* average empty reads that show that threads are on another core */
#define MAX_TRIED 8        /* cores to try before giving up for a while */
#define REST_NS 100000000  /* how long, at first */
#define MAX_REST_NS 10000000000

/* State of the calling thread, a resolver.  Initial-exec: accessed without a call. */
#define INITIAL_EXEC __attribute__((tls_model("initial-exec")))

static _Thread_local struct {
    cpu_set_t allowed; /* its own affinity, when it follows no thread */
    int cores;         /* how many it has */
    uint64_t apart;    /* until when it follows no thread, CLOCK_MONOTONIC ns */
    int core;          /* the one it is bound to; -1: none */
    int known;         /* whether `allowed` is set */
} here INITIAL_EXEC;

/* The calling thread's search for a core. */
static _Thread_local struct {
    unsigned faults, tried; /* faults in this window; cores tried so far */
    uint64_t reads;         /* empty ones, in this window */
    uint64_t rest, until;   /* how long, and until when, not to search, ns */
    int bound;              /* to a core found by searching */
} search INITIAL_EXEC;

static int read_affinity(void)
{
    if (!here.known) {
        if (sched_getaffinity(0, sizeof(here.allowed), &here.allowed))
            return 0;
        here.known = 1;
        here.cores = CPU_COUNT(&here.allowed);
        here.core = -1;
    }
    return 1;
}

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

/* Moves to the core to which `thread` is bound, if it is. */
static UFFDAEMON_COLD void follow(pid_t thread, uint64_t now)
{
    int core;

    if (now < here.apart || !read_affinity())
        return;
    core = bound_to(thread);
    if (core >= 0 && !CPU_ISSET(core, &here.allowed))
        core = -1;
    if (core == here.core)
        return;
    if (here.core >= 0) {
        /* Another thread on another core: do not bounce between them. */
        here.apart = now + APART_NS;
        core = -1;
    }
    run_on(core);
}

/* `count` faults have been read; the first is of `thread`, 0 if unknown. */
UFFDAEMON_HOT void uffdaemon_affinity_follow(uint64_t *faults, pid_t thread, size_t count,
                                             uint64_t now)
{
    uint64_t before = *faults;

    *faults += count;
    if (thread && (!before || before / INTERVAL != *faults / INTERVAL))
        follow(thread, now);
}

/* The next core after `core` on which the resolver may run. */
static int next_core(int core)
{
    for (int step = 1; step <= CPU_SETSIZE; step++)
        if (CPU_ISSET((core + step) % CPU_SETSIZE, &here.allowed))
            return (core + step) % CPU_SETSIZE;
    return core;
}

/* Leaves the core found by searching, if any, and does not search for a while. */
void uffdaemon_affinity_give_up(uint64_t now)
{
    if (!search.bound)
        return;
    run_on(-1);
    search.bound = 0;
    search.tried = 0;
    search.rest = search.rest ? 2 * search.rest : REST_NS;
    if (search.rest > MAX_REST_NS)
        search.rest = MAX_REST_NS;
    search.until = now + search.rest;
}

/* Assesses the core after a window of faults, and tries another one if the faults are far. */
static UFFDAEMON_COLD void assess(uint64_t now)
{
    int far = search.reads > WINDOW * FAR;

    search.faults = 0;
    search.reads = 0;
    if (now < search.until || !read_affinity() || here.cores < 2)
        return;
    if (!far) {
        search.tried = 0;
        search.rest = 0;
    } else if (search.tried < MAX_TRIED && (int)search.tried < here.cores) {
        search.tried++;
        search.bound = 1;
        run_on(next_core(here.core >= 0 ? here.core : sched_getcpu()));
    } else {
        uffdaemon_affinity_give_up(now);
    }
}

/* A single fault, back-to-back with the previous one, came after `reads` empty reads.  Its
 * thread is unknown. */
UFFDAEMON_HOT void uffdaemon_affinity_search(unsigned reads, uint64_t now)
{
    search.reads += reads;
    if (++search.faults >= WINDOW)
        assess(now);
}
