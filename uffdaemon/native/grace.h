/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Grace periods, as in the kernel's SRCU.
 *
 * A reader is between `uffdaemon_read_lock` and `uffdaemon_read_unlock`, and never waits.  A writer
 * unpublishes a pointer, calls `uffdaemon_synchronize`, and may free what it pointed to.  Signal
 * handlers may read.
 */
#ifndef UFFDAEMON_GRACE_H
#define UFFDAEMON_GRACE_H

#include <stdatomic.h>
#include <stdint.h>

struct uffdaemon_readers {
    _Atomic uint64_t epoch;     /* its lowest bit chooses the counter of new readers */
    _Atomic uint64_t inside[2]; /* readers */
};

/* Returns a ticket for `uffdaemon_read_unlock`.  What is loaded until then stays valid. */
static inline unsigned uffdaemon_read_lock(struct uffdaemon_readers *readers)
{
    unsigned ticket = atomic_load(&readers->epoch) & 1;

    atomic_fetch_add(&readers->inside[ticket], 1);
    return ticket;
}

static inline void uffdaemon_read_unlock(struct uffdaemon_readers *readers, unsigned ticket)
{
    atomic_fetch_sub(&readers->inside[ticket], 1);
}

void uffdaemon_synchronize(struct uffdaemon_readers *readers);

#endif
