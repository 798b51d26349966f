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

unsigned uffdaemon_read_lock(struct uffdaemon_readers *readers);
void uffdaemon_read_unlock(struct uffdaemon_readers *readers, unsigned ticket);
void uffdaemon_synchronize(struct uffdaemon_readers *readers);

#endif
