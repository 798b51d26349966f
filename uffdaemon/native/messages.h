/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reading messages of a userfaultfd, without ever waiting.
 *
 * O_NONBLOCK is a flag of the open file description, which a client shares: it can clear it at any
 * moment, and read(2) would wait for ever.  So each read says for itself that it must not wait.
 */
#ifndef UFFDAEMON_MESSAGES_H
#define UFFDAEMON_MESSAGES_H

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base.h"

#define UFFDAEMON_RWF_NOWAIT 8 /* RWF_NOWAIT, Linux 4.14; for userfaultfds 6.10 */

UFFDAEMON_COLD long uffdaemon_read_checked(int fd, void *messages, size_t bytes);
UFFDAEMON_COLD void uffdaemon_do_not_block(int fd);
long uffdaemon_read(int fd, void *messages, size_t bytes, unsigned rereads);

/* As read(2), but never waits.  Not by preadv2(3): a cancellation point, and with it three more
 * pages of libc. */
static inline long uffdaemon_read_pending(int fd, void *messages, size_t bytes)
{
    struct iovec into = {messages, bytes};
    long count = syscall(SYS_preadv2, fd, &into, 1UL, -1L, -1L, UFFDAEMON_RWF_NOWAIT);

    if (count < 0 && (errno == EOPNOTSUPP || errno == ENOSYS))
        return uffdaemon_read_checked(fd, messages, bytes);
    return count;
}

/* To be closed for the descriptor that a FORK event brings. */
void uffdaemon_spare_open(_Atomic int32_t *spare);
int uffdaemon_spare_close(_Atomic int32_t *spare);
int uffdaemon_may_pass(long result);

#endif
