/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The resolver's thread goes where the threads are that it answers.
 *
 * Waking a thread on another core, which may have to be woken itself, costs several times what
 * answering does.  A thread that faults and is bound to one core is met there, as long as all that
 * are seen are bound to the same one, and as the resolver may run there at all.  Of a userfaultfd
 * that does not tell threads (Features.THREAD_ID), the core is found by trying: on another core a
 * fault comes after dozens of reads in vain, on the same one with the first.
 */
#define _GNU_SOURCE
#include "affinity.h"

#include <sched.h>

#include "base.h"

#define INTERVAL 64        /* faults between two looks at where their thread may run */
#define APART_NS 500000000 /* for so long, threads bound to different cores are not followed */
#define WINDOW 64          /* faults by which a core is judged */
#define FAR 8              /* so many reads in vain, on average, are made on another core */
#define MAX_TRIED 8        /* cores, before it is given up for a while */
#define REST_NS 100000000  /* for so long, at first */
#define MAX_REST_NS 10000000000

/* Of the thread that calls; only resolvers do.  Initial-exec: found without a call for every fault. */
#define INITIAL_EXEC __attribute__((tls_model("initial-exec")))

static _Thread_local struct {
    cpu_set_t allowed; /* where it may run when it follows nobody */
    int cores;         /* how many these are */
    uint64_t apart;    /* until when it follows nobody, CLOCK_MONOTONIC ns */
    int core;          /* where it is by now; -1: anywhere */
    int known;
} here INITIAL_EXEC;

/* The search, of that thread as well. */
static _Thread_local struct {
    unsigned faults, tried; /* in this window; cores in vain */
    uint64_t reads;         /* in vain, in this window */
    uint64_t rest, until;   /* how long, and until when, it is given up, ns */
    int bound;              /* to a core that it has chosen */
} search INITIAL_EXEC;

static int learn_where(void)
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

/* Goes to where `thread` is bound, if it is. */
static UFFDAEMON_COLD void follow(pid_t thread, uint64_t now)
{
    int core;

    if (now < here.apart || !learn_where())
        return;
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

/* One of the `count` threads whose faults have just been read is `thread`, 0 if that is not known. */
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

/* Leaves the core that was chosen, if one was, and chooses none for a while. */
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

/* Judges the core by a window of faults, and goes to another one if it is far from them. */
static UFFDAEMON_COLD void judge(uint64_t now)
{
    int far = search.reads > WINDOW * FAR;

    search.faults = 0;
    search.reads = 0;
    if (now < search.until || !learn_where() || here.cores < 2)
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

/* A single fault, back-to-back with the one before, came after `reads` in vain; whose it is, is not
 * known. */
UFFDAEMON_HOT void uffdaemon_affinity_search(unsigned reads, uint64_t now)
{
    search.reads += reads;
    if (++search.faults >= WINDOW)
        judge(now);
}
