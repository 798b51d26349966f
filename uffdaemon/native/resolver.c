/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The resolver: a thread that serves any number of ports and never needs the interpreter.
 */
#define _GNU_SOURCE
#include "resolver.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base.h"
#include "epoll.h"
#include "queue.h"

#define HOUR_NS 3600000000000

struct uffdaemon_resolver {
    int epoll;
    int kick; /* an eventfd: readable while another thread wants this one to wake up */
    _Atomic int tid;
    _Atomic uint32_t stopping;
    pid_t process;           /* its process: a forked child has no such thread */
    _Atomic uint64_t rounds; /* returns from epoll_wait */
    pthread_t thread;
    pthread_mutex_t removing;
};

static void *run(void *argument)
{
    struct uffdaemon_resolver *resolver = argument;
    struct uffdaemon_port *hot = NULL;

    atomic_store_explicit(&resolver->tid, (int)syscall(SYS_gettid), memory_order_release);
    while (!atomic_load_explicit(&resolver->stopping, memory_order_acquire)) {
        uffdaemon_epoll_wait(resolver->epoll, HOUR_NS, &hot);
        atomic_fetch_add(&resolver->rounds, 1);
    }
    return NULL;
}

static void release(struct uffdaemon_resolver *resolver)
{
    if (resolver->kick >= 0)
        close(resolver->kick);
    if (resolver->epoll >= 0)
        close(resolver->epoll);
    pthread_mutex_destroy(&resolver->removing);
    free(resolver);
}

/* Starts the thread.  NULL, and an errno in *error, on failure. */
struct uffdaemon_resolver *uffdaemon_resolver_start(int *error)
{
    struct uffdaemon_resolver *resolver = calloc(1, sizeof(*resolver));
    sigset_t all, old;

    if (!resolver) {
        *error = ENOMEM;
        return NULL;
    }
    pthread_mutex_init(&resolver->removing, NULL);
    resolver->process = getpid();
    resolver->epoll = uffdaemon_epoll_open();
    resolver->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    *error = resolver->epoll < 0 ? -resolver->epoll : resolver->kick < 0 ? errno : 0;
    if (!*error)
        *error = -uffdaemon_epoll_add(resolver->epoll, resolver->kick, UINT64_MAX);
    if (*error) {
        release(resolver);
        return NULL;
    }
    /* Signals belong to the application's threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    *error = pthread_create(&resolver->thread, NULL, run, resolver);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (*error) {
        release(resolver);
        return NULL;
    }
    pthread_setname_np(resolver->thread, "uffd-resolver");
    return resolver;
}

/* The thread's id, 0 before it runs. */
int uffdaemon_resolver_thread(const struct uffdaemon_resolver *resolver)
{
    return atomic_load_explicit(&resolver->tid, memory_order_acquire);
}

int uffdaemon_resolver_add(struct uffdaemon_resolver *resolver, struct uffdaemon_port *port)
{
    return uffdaemon_epoll_add(resolver->epoll, port->fd, (uint64_t)(uintptr_t)port);
}

/* Waits until the thread has no pointer left from before the call: one round may be under way,
 * and the next one may serve a port that the last one kept. */
static void synchronize(struct uffdaemon_resolver *resolver)
{
    struct timespec pause = {0, 20000};
    uint64_t one = 1, before = atomic_load(&resolver->rounds);

    while (write(resolver->kick, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
    while (atomic_load(&resolver->rounds) - before < 3)
        nanosleep(&pause, NULL);
    while (read(resolver->kick, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

/* Stops serving the port; the thread does not refer to it when this returns. */
void uffdaemon_resolver_remove(struct uffdaemon_resolver *resolver, struct uffdaemon_port *port)
{
    atomic_store(&port->closing, 1);
    if (resolver->process != getpid())
        return;
    uffdaemon_epoll_remove(resolver->epoll, port->fd);
    /* One caller at a time: the first to finish drains the eventfd. */
    pthread_mutex_lock(&resolver->removing);
    synchronize(resolver);
    pthread_mutex_unlock(&resolver->removing);
    /* What was to be tried again is Python's now. */
    uffdaemon_port_hand_over(port);
}

/* Ends the thread and frees the resolver. */
void uffdaemon_resolver_stop(struct uffdaemon_resolver *resolver)
{
    uint64_t one = 1;

    if (resolver->process != getpid())
        return;
    atomic_store_explicit(&resolver->stopping, 1, memory_order_release);
    while (write(resolver->kick, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
    pthread_join(resolver->thread, NULL);
    release(resolver);
}
