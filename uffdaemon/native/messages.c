/* SPDX-License-Identifier: Apache-2.0 */
/* Reading messages, with a bounded number of further tries before the caller goes to sleep. */
#include "messages.h"

#include <errno.h>
#include <sched.h>
#include <unistd.h>

/* Reads as many messages as are pending and fit.  While there are none, yields the processor and
 * reads again, at most `rereads` times: on one core the yield lets the faulting thread run, on two
 * it costs less than the two wake-ups that sleeping would.  Returns bytes, or -errno; -EAGAIN when
 * nothing came. */
long uffdaemon_read(int fd, void *messages, size_t bytes, unsigned rereads)
{
    for (;;) {
        ssize_t count = read(fd, messages, bytes);

        if (count >= 0)
            return (long)count;
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
        if (rereads == 0)
            return -EAGAIN;
        rereads--;
        sched_yield();
    }
}
