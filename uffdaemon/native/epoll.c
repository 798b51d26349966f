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

/* Serves one port; it is `hot` if its turn ended while it was busy.  Returns whether Python has to
 * handle it before anything else; never for a port with an eventfd. */
static int serve(int epoll, struct uffdaemon_port *port, struct uffdaemon_port **hot)
{
    int notified = port->notify >= 0;

    if (!failed(port) && uffdaemon_serve(port))
        *hot = port;
    if (!notified)
        return failed(port) || uffdaemon_queue_count(&port->queue);
    if (failed(port))
        uffdaemon_epoll_remove(epoll, port->fd); /* always ready, and never read again */
    if (uffdaemon_queue_count(&port->queue) && *hot != port)
        uffdaemon_port_notify(port);
    return 0;
}

/* Waits and serves for at most `timeout` ns.  Returns an enum uffdaemon_epoll_result, or -errno.
 * *kept is NULL at first, and then the port that was busy when its turn ended; `kept` may be
 * NULL. */
int uffdaemon_epoll_wait(int epoll, int64_t timeout, struct uffdaemon_port **kept)
{
    uint64_t end = uffdaemon_now() + (uint64_t)timeout;
    struct uffdaemon_port *none = NULL;
    struct uffdaemon_port **hot = kept ? kept : &none;

    for (;;) {
        struct epoll_event events[32];
        struct uffdaemon_port *again = *hot;
        uint64_t now = uffdaemon_now();
        /* Rounded up, as the event loop does: never wake before a timer has expired. */
        uint64_t rest = now < end && !*hot ? (end - now + 999999) / 1000000 : 0;
        int count = epoll_wait(epoll, events, 32, rest > 3600000 ? 3600000 : (int)rest);
        int loop = 0, python = 0;

        if (count < 0)
            return errno == EINTR ? UFFDAEMON_EPOLL_TIME : -errno;
        *hot = NULL;
        if (again)
            python |= serve(epoll, again, hot);
        for (int index = 0; index < count; index++) {
            struct uffdaemon_port *port = (void *)(uintptr_t)events[index].data.u64;

            if (events[index].data.u64 == LOOP) {
                loop = 1;
                continue;
            }
            if (events[index].events & EPOLLERR)
                uffdaemon_do_not_block(port->fd);
            if (port != again)
                python |= serve(epoll, port, hot);
        }
        if (python)
            return UFFDAEMON_EPOLL_PYTHON;
        if (loop)
            return UFFDAEMON_EPOLL_OTHER;
        if (uffdaemon_now() >= end)
            return UFFDAEMON_EPOLL_TIME;
    }
}
