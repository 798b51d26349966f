/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Waiting for userfaultfds and serving them, in one thread.
 *
 * `uffdaemon_epoll_wait` replaces an event loop's sleep, or is the body of a resolver's loop: it
 * waits for the userfaultfds and for one more descriptor (the loop's epoll, or the resolver's
 * eventfd), and resolves by rules what it can.
 */
#include "epoll.h"

#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "back_pressure.h"
#include "base.h"
#include "messages.h"
#include "queue.h"
#include "serve.h"

#define LOOP UINT64_MAX /* epoll data of the other descriptor */

/* An epoll descriptor to wait on, which the caller closes; or -errno. */
int uffdaemon_epoll_open(void)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    return epoll < 0 ? -errno : epoll;
}

/* Waits for `fd` as well: the userfaultfd of the port at address `port`, or with UINT64_MAX the
 * other descriptor. */
int uffdaemon_epoll_add(int epoll, int fd, uint64_t port)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = port};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

int uffdaemon_epoll_remove(int epoll, int fd)
{
    return epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL) ? -errno : 0;
}

static int failed(const struct uffdaemon_port *port)
{
    return atomic_load_explicit(&port->error, memory_order_relaxed) != 0;
}

static void keep(struct uffdaemon_port *port, struct uffdaemon_port **hot)
{
    port->is_hot = 1;
    port->next_hot = *hot;
    *hot = port;
}

/* Waits for the port's userfaultfd again, or no longer. */
static void wait_for(int epoll, struct uffdaemon_port *port, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u64 = (uint64_t)(uintptr_t)port};

    epoll_ctl(epoll, EPOLL_CTL_MOD, port->fd, &event);
}

/* Serves one port; it is `hot` if its turn ended while it was busy.  Returns whether Python has to
 * handle it before anything else; never for a port with an eventfd. */
static int serve(int epoll, struct uffdaemon_port *port, struct uffdaemon_port **hot)
{
    int notified = port->notify >= 0, next = failed(port) ? 0 : uffdaemon_serve(port);

    if (next == UFFDAEMON_SERVE_FULL)
        next = uffdaemon_serve_slowly(port);
    if (next) {
        port->paused = next == UFFDAEMON_SERVE_PAUSED;
        if (port->paused)
            wait_for(epoll, port, 0);
        keep(port, hot);
    }
    if (!notified)
        return failed(port) || uffdaemon_queue_count(&port->queue);
    if (failed(port))
        uffdaemon_epoll_remove(epoll, port->fd); /* never to be read again, and always ready */
    if (uffdaemon_queue_count(&port->queue) && !port->is_hot)
        uffdaemon_port_notify(port);
    return 0;
}

/* Serves a port that was paused, if its time has come. */
static UFFDAEMON_COLD int resume(int epoll, struct uffdaemon_port *port,
                                 struct uffdaemon_port **hot)
{
    int python;

    if (atomic_load_explicit(&port->closing, memory_order_relaxed))
        return 0;
    if (uffdaemon_now() < port->resume) {
        keep(port, hot);
        return 0;
    }
    port->paused = 0;
    python = serve(epoll, port, hot);
    if (!port->paused && !failed(port))
        wait_for(epoll, port, EPOLLIN);
    return python;
}

/* For how many milliseconds to sleep at most, where not all ports are waited for. */
static int until_resumed(const struct uffdaemon_port *hot)
{
    for (; hot; hot = hot->next_hot)
        if (!hot->paused)
            return 0;
    return 1;
}

/* Whether faults wait for another try, which the next wait would not know of. */
static int unfinished(const struct uffdaemon_port *hot)
{
    for (; hot; hot = hot->next_hot)
        if (hot->postponed)
            return 1;
    return 0;
}

/* Has the ports be hot no more that are kept for nobody. */
static int leave(struct uffdaemon_port **hot, struct uffdaemon_port **kept, int why)
{
    int python = !kept && unfinished(*hot);

    for (; !kept && *hot; *hot = (*hot)->next_hot)
        (*hot)->is_hot = 0;
    return python ? UFFDAEMON_EPOLL_PYTHON : why;
}

/* Waits and serves for at most `timeout` ns.  Returns 0 when the time is over or a signal came, 1
 * when the other descriptor is ready, 2 when a port has something for Python; or -errno.  *kept is
 * NULL at first, and from then on the ports that are not to be slept over; `kept` may be NULL. */
int uffdaemon_epoll_wait(int epoll, int64_t timeout, struct uffdaemon_port **kept)
{
    uint64_t end = uffdaemon_now() + (uint64_t)timeout;
    struct uffdaemon_port *none = NULL;
    struct uffdaemon_port **hot = kept ? kept : &none;

    for (;;) {
        struct epoll_event events[32];
        struct uffdaemon_port *again = *hot, *each;
        uint64_t now = uffdaemon_now();
        /* Rounded up, as the event loop does: never wake before a timer has expired. */
        uint64_t rest = now < end ? (end - now + 999999) / 1000000 : 0;
        int count = epoll_wait(epoll, events, 32,
                               *hot             ? until_resumed(*hot)
                               : rest > 3600000 ? 3600000
                                                : (int)rest);
        int loop = 0, python = 0;

        if (count < 0)
            return errno == EINTR ? leave(hot, kept, UFFDAEMON_EPOLL_TIME) : -errno;
        *hot = NULL;
        while ((each = again)) {
            again = each->next_hot;
            each->is_hot = 0;
            python |= each->paused ? resume(epoll, each, hot) : serve(epoll, each, hot);
        }
        for (int index = 0; index < count; index++) {
            struct uffdaemon_port *port = (void *)(uintptr_t)events[index].data.u64;

            if (events[index].data.u64 == LOOP) {
                loop = 1;
                continue;
            }
            if (events[index].events & EPOLLERR)
                uffdaemon_do_not_block(port->fd);
            if (!port->is_hot)
                python |= serve(epoll, port, hot);
        }
        if (python)
            return leave(hot, kept, UFFDAEMON_EPOLL_PYTHON);
        if (loop)
            return leave(hot, kept, UFFDAEMON_EPOLL_OTHER);
        if (uffdaemon_now() >= end)
            return leave(hot, kept, UFFDAEMON_EPOLL_TIME);
    }
}
