/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Waiting for userfaultfds and serving them, in one thread.
 *
 * `uffdaemon_epoll_wait` takes the place of an event loop's own sleep, or is all that a resolver's thread
 * does: it waits for the userfaultfds and for one more descriptor (the loop's epoll, or what tells
 * the thread to look around) together, and answers by rules whatever can be answered so.
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
 * look at it before anything else: where it is told by a descriptor, it has not. */
static int attend(int epoll, struct uffdaemon_port *port, struct uffdaemon_port **hot)
{
    int told = port->notify >= 0;

    if (!failed(port) && uffdaemon_serve(port))
        *hot = port;
    if (!told)
        return failed(port) || uffdaemon_queue_count(&port->queue);
    if (failed(port))
        uffdaemon_epoll_remove(epoll, port->fd); /* never to be read again, and always ready */
    if (uffdaemon_queue_count(&port->queue) && *hot != port)
        uffdaemon_port_notify(port);
    return 0;
}

/* Waits and serves for at most `timeout` ns.  Returns 0 when the time is over or a signal came, 1
 * when the other descriptor is ready, 2 when a port has something for Python; or -errno.  `kept` is
 * NULL at first, and from then on the port that is not to be slept over; it may be NULL itself. */
int uffdaemon_epoll_wait(int epoll, int64_t timeout, struct uffdaemon_port **kept)
{
    uint64_t end = uffdaemon_now() + (uint64_t)timeout;
    struct uffdaemon_port *nobody = NULL;
    struct uffdaemon_port **hot = kept ? kept : &nobody;

    for (;;) {
        struct epoll_event events[32];
        struct uffdaemon_port *again = *hot;
        uint64_t now = uffdaemon_now();
        /* Rounded up, as the event loop itself does: never woken for a timer not yet due. */
        uint64_t rest = now < end && !*hot ? (end - now + 999999) / 1000000 : 0;
        int count = epoll_wait(epoll, events, 32, rest > 3600000 ? 3600000 : (int)rest);
        int loop = 0, python = 0;

        if (count < 0)
            return errno == EINTR ? UFFDAEMON_EPOLL_TIME : -errno;
        *hot = NULL;
        if (again)
            python |= attend(epoll, again, hot);
        for (int index = 0; index < count; index++) {
            struct uffdaemon_port *port = (void *)(uintptr_t)events[index].data.u64;

            if (events[index].data.u64 == LOOP) {
                loop = 1;
                continue;
            }
            if (events[index].events & EPOLLERR)
                uffdaemon_do_not_block(port->fd);
            if (port != again)
                python |= attend(epoll, port, hot);
        }
        if (python)
            return UFFDAEMON_EPOLL_PYTHON;
        if (loop)
            return UFFDAEMON_EPOLL_OTHER;
        if (uffdaemon_now() >= end)
            return UFFDAEMON_EPOLL_TIME;
    }
}
