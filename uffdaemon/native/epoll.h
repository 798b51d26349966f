/* SPDX-License-Identifier: Apache-2.0 */
/* Waiting for userfaultfds, and serving them, in one thread. */
#ifndef UFFDAEMON_EPOLL_H
#define UFFDAEMON_EPOLL_H

#include "port.h"

/* Why `uffdaemon_epoll_wait` has returned. */
enum uffdaemon_epoll_result {
    UFFDAEMON_EPOLL_TIME = 0,   /* timeout or signal */
    UFFDAEMON_EPOLL_OTHER = 1,  /* the other descriptor is ready */
    UFFDAEMON_EPOLL_PYTHON = 2, /* a port has something for Python */
};

int uffdaemon_epoll_open(void);
int uffdaemon_epoll_add(int epoll, int fd, uint64_t port);
int uffdaemon_epoll_remove(int epoll, int fd);
int uffdaemon_epoll_wait(int epoll, int64_t timeout, struct uffdaemon_port **hot);

#endif
