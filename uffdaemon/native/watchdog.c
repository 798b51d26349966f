/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The watchdog: a thread that reports every fault that Python has not dequeued, or not finished, in
 * time.
 *
 * Python itself may be waiting for such a fault.  So this thread needs nothing from Python: it
 * looks at the queues of the ports, and at userfaultfds that are not being read; stall.c does the
 * rest.
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
#include "events.h"
#include "messages.h"
#include "operations.h"
#include "queue.h"
#include "stall.h"

#define ROUND_NS 100000000 /* between checks while something waits for Python */
#define POLL_NS 250000000  /* between checks of userfaultfds that may have no reader */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct uffdaemon_watch *watches;
static pid_t process; /* the one with the thread */

/* Checks the queue, then the batch, in this order: a record enters the batch before it leaves the
 * queue.  Returns whether there is anything. */
static int check_queue(struct uffdaemon_watch *watch, uint64_t now)
{
    struct uffd_msg messages[UFFDAEMON_REPORT_MAX];
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
                               uffdaemon_queue_pending(queue, messages, UFFDAEMON_REPORT_MAX),
                               now - since, UFFDAEMON_STALL_NOT_DEQUEUED);
    return 1;
}
_Static_assert(UFFDAEMON_OUTSTANDING <= UFFDAEMON_REPORT_MAX, "a batch fits into one report");

/* Checks for messages that are not being read.  Faults read here are woken, so that they come
 * again; events go to the port's queue. */
static void check_descriptor(struct uffdaemon_watch *watch, uint64_t now)
{
    struct pollfd ready = {.fd = watch->fd, .events = POLLIN};
    struct uffd_msg messages[UFFDAEMON_REPORT_MAX];
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
    if (watch->port && uffdaemon_timedlock(&watch->port->change))
        return;
    bytes = watch->port && !uffdaemon_queue_reserve(&watch->port->queue)
                ? 0
                : uffdaemon_read_pending(watch->fd, messages, sizeof(messages));
    for (size_t index = 0; watch->port && bytes > 0 && index < (size_t)bytes / sizeof(messages[0]);
         index++) {
        struct uffdaemon_record record = {.message = messages[index], .latency = now};

        if (messages[index].event == UFFD_EVENT_PAGEFAULT)
            continue;
        uffdaemon_apply_event(watch->port, &record);
        uffdaemon_queue_push(&watch->port->queue, &record, now);
    }
    if (watch->port)
        uffdaemon_unlock(&watch->port->change);
    if (bytes <= 0)
        return;
    uffdaemon_stall_report(
        watch, messages, (size_t)bytes / sizeof(messages[0]), now - watch->unread_since,
        watch->port ? UFFDAEMON_STALL_NOT_DEQUEUED : UFFDAEMON_STALL_OWNER_ENDED);
    for (size_t index = 0; index < (size_t)bytes / sizeof(messages[0]); index++)
        if (messages[index].event == UFFD_EVENT_PAGEFAULT && watch->port)
            watch->reread[watch->reread_count++] = messages[index].arg.pagefault.address;
    watch->unread_since = 0;
    watch->quiet = watch->port != NULL;
}

/* Checks everything once.  Returns how long to sleep, ns; 0: until the alarm. */
static uint64_t check_all(void)
{
    uint64_t now = uffdaemon_now(), pause = 0;

    pthread_mutex_lock(&lock);
    uffdaemon_alarm_clear();
    for (struct uffdaemon_watch *watch = watches; watch; watch = watch->next) {
        if (!watch->port || watch->port->notify < 0) {
            check_descriptor(watch, now);
            if (!pause)
                pause = POLL_NS;
        }
        if (watch->port && check_queue(watch, now))
            pause = ROUND_NS;
    }
    pthread_mutex_unlock(&lock);
    uffdaemon_stall_write();
    pthread_mutex_lock(&lock);
    for (struct uffdaemon_watch *watch = watches; watch; watch = watch->next)
        uffdaemon_stall_act(watch);
    pthread_mutex_unlock(&lock);
    return pause;
}

static void *run(void *argument)
{
    (void)argument;
    for (;;) {
        uint64_t pause = check_all();
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

/* Monitors a userfaultfd: the records of `port`, or with NULL one that is not served.  `after`
 * is ns. On `signal`, faulthandler writes a thread's stack; 0: none.  Returns NULL, and an errno
 * in *error, on failure. */
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
        /* A forked child: the watches are its parent's, and a thread of the parent may hold the
         * lock. */
        pthread_mutex_t unlocked = PTHREAD_MUTEX_INITIALIZER;

        lock = unlocked;
        watches = NULL;
        uffdaemon_stall_forget();
    }
    pthread_mutex_lock(&lock);
    *error = -start();
    if (!*error) {
        watch->next = watches;
        watches = watch;
    }
    pthread_mutex_unlock(&lock);
    uffdaemon_alarm_raise();
    if (*error) {
        uffdaemon_free(watch);
        return NULL;
    }
    return watch;
}

/* Stops monitoring; neither port nor descriptor is used when this returns. */
void uffdaemon_watch_remove(struct uffdaemon_watch *watch)
{
    struct uffdaemon_watch **at;

    if (process != getpid())
        return;
    pthread_mutex_lock(&lock);
    for (at = &watches; *at; at = &(*at)->next)
        if (*at == watch) {
            *at = watch->next;
            uffdaemon_free(watch);
            break;
        }
    pthread_mutex_unlock(&lock);
}
