/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The watchdog: a thread that says who waits when Python cannot.
 *
 * A fault that has been forwarded, or that nobody reads, and that Python does not take in for a
 * while, or does not come to an end with, may be one that Python itself waits for.  This thread needs
 * nothing of Python: it looks at what the ports keep; stall.c does the rest.
 */
#define _GNU_SOURCE
#include "watchdog.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "alarm.h"
#include "base.h"
#include "messages.h"
#include "operations.h"
#include "queue.h"
#include "stall.h"

#define ROUND_NS 100000000 /* between two looks while something waits for Python */
#define POLL_NS 250000000  /* the same at userfaultfds that nobody may be reading */

static pthread_mutex_t watching = PTHREAD_MUTEX_INITIALIZER;
static struct uffdaemon_watch *watches;
static pid_t process;

/* What was forwarded and is not taken, and what Python is at; whether there is anything.  In this
 * order: what is taken is the latter before it is not the former any more. */
static int look_at_queue(struct uffdaemon_watch *watch, uint64_t now)
{
    struct uffd_msg messages[UFFDAEMON_LOOK];
    struct uffdaemon_queue *queue = &watch->port->queue;
    uint64_t since = atomic_load(&queue->since);
    uint64_t outstanding_since = atomic_load(&queue->outstanding_since);

    if (!since && !outstanding_since) {
        memset(watch->reported, 0, sizeof(watch->reported));
        return 0;
    }
    if (outstanding_since && now > outstanding_since && now - outstanding_since >= watch->after)
        uffdaemon_stall_report(watch, messages, uffdaemon_queue_outstanding(queue, messages),
                               now - outstanding_since, UFFDAEMON_STALL_OUTSTANDING);
    if (since && now > since && now - since >= watch->after)
        uffdaemon_stall_report(watch, messages,
                               uffdaemon_queue_pending(queue, messages, UFFDAEMON_LOOK),
                               now - since, UFFDAEMON_STALL_NOT_DEQUEUED);
    return 1;
}
_Static_assert(UFFDAEMON_OUTSTANDING <= UFFDAEMON_LOOK, "what Python is at");

/* What nobody reads.  Faults that are read here are woken, so that they come again; events are the
 * port's. */
static void look_at_descriptor(struct uffdaemon_watch *watch, uint64_t now)
{
    struct pollfd ready = {.fd = watch->fd, .events = POLLIN};
    struct uffd_msg messages[UFFDAEMON_LOOK];
    uint64_t reads = watch->port ? atomic_load_explicit(&watch->port->reads, memory_order_relaxed)
                                 : 0;
    ssize_t bytes;

    if (poll(&ready, 1, 0) <= 0 || !(ready.revents & POLLIN) || reads != watch->reads) {
        watch->reads = reads;
        watch->unread_since = 0;
        watch->quiet = 0;
        return;
    }
    if (watch->quiet)
        return;
    if (!watch->unread_since)
        watch->unread_since = now;
    if (now - watch->unread_since < watch->after)
        return;
    bytes = uffdaemon_read_pending(watch->fd, messages, sizeof(messages));
    if (bytes <= 0)
        return;
    uffdaemon_stall_report(
        watch, messages, (size_t)bytes / sizeof(messages[0]), now - watch->unread_since,
        watch->port ? UFFDAEMON_STALL_NOT_DEQUEUED : UFFDAEMON_STALL_OWNER_ENDED);
    for (size_t index = 0; index < (size_t)bytes / sizeof(messages[0]); index++) {
        struct uffdaemon_record record = {.message = messages[index], .latency = now};

        if (messages[index].event != UFFD_EVENT_PAGEFAULT && watch->port)
            uffdaemon_queue_push(&watch->port->queue, &record, now);
        else if (messages[index].event == UFFD_EVENT_PAGEFAULT && watch->port)
            watch->reread[watch->reread_count++] = messages[index].arg.pagefault.address;
    }
    watch->unread_since = 0;
    watch->quiet = watch->port != NULL;
}

/* Looks at everything once; returns how long nothing can be missed, ns, or 0: until the alarm. */
static uint64_t look_around(void)
{
    uint64_t now = uffdaemon_now(), pause = 0;

    pthread_mutex_lock(&watching);
    uffdaemon_alarm_clear();
    for (struct uffdaemon_watch *watch = watches; watch; watch = watch->next) {
        if (!watch->port || watch->port->notify < 0) {
            look_at_descriptor(watch, now);
            if (!pause)
                pause = POLL_NS;
        }
        if (watch->port && look_at_queue(watch, now))
            pause = ROUND_NS;
    }
    pthread_mutex_unlock(&watching);
    uffdaemon_stall_write();
    pthread_mutex_lock(&watching);
    for (struct uffdaemon_watch *watch = watches; watch; watch = watch->next)
        uffdaemon_stall_act(watch);
    pthread_mutex_unlock(&watching);
    return pause;
}

static void *run(void *argument)
{
    (void)argument;
    for (;;) {
        uint64_t pause = look_around();
        struct timespec time = {0, (long)pause};

        if (pause)
            nanosleep(&time, NULL);
        else
            uffdaemon_alarm_wait();
    }
    return NULL;
}

/* Starts the thread, if this process has none.  0 or -errno. */
static int start(void)
{
    sigset_t blocked, old;
    pthread_t thread;
    int error;

    if (process == getpid())
        return 0;
    sigfillset(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, &old);
    error = pthread_create(&thread, NULL, run, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (error)
        return -error;
    pthread_setname_np(thread, "uffd-watchdog");
    pthread_detach(thread);
    process = getpid();
    return 0;
}

/* Watches a userfaultfd: what `port` keeps from Python, or with NULL one that nobody serves.  `after`
 * is ns.  `signal` makes faulthandler write the stack of a thread; 0: nothing does.  NULL: *error says why. */
struct uffdaemon_watch *uffdaemon_watch_add(int fd, struct uffdaemon_port *port, uint64_t after,
                                            unsigned then, int signal, const char *name, int *error)
{
    struct uffdaemon_watch *watch = uffdaemon_alloc(sizeof(*watch));

    if (!watch) {
        *error = ENOMEM;
        return NULL;
    }
    watch->fd = fd;
    watch->port = port;
    watch->after = after;
    watch->then = then;
    watch->stacks = signal;
    strncpy(watch->name, name, sizeof(watch->name) - 1);
    if (process && process != getpid()) {
        /* A forked child: its parent's watches are not its own, and the lock may be anybody's. */
        pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;

        watching = fresh;
        watches = NULL;
        uffdaemon_stall_forget();
    }
    pthread_mutex_lock(&watching);
    *error = -start();
    if (!*error) {
        watch->next = watches;
        watches = watch;
    }
    pthread_mutex_unlock(&watching);
    uffdaemon_alarm_raise();
    if (*error) {
        uffdaemon_free(watch);
        return NULL;
    }
    return watch;
}

/* Watches it no more; neither port nor descriptor is used when this returns. */
void uffdaemon_watch_remove(struct uffdaemon_watch *watch)
{
    struct uffdaemon_watch **at;

    if (process != getpid())
        return;
    pthread_mutex_lock(&watching);
    for (at = &watches; *at; at = &(*at)->next)
        if (*at == watch) {
            *at = watch->next;
            uffdaemon_free(watch);
            break;
        }
    pthread_mutex_unlock(&watching);
}
