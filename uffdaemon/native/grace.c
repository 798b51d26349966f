/* SPDX-License-Identifier: Apache-2.0 */
/* Grace periods: waiting until no reader holds what was unpublished. */
#include "grace.h"

#include <sched.h>
#include <time.h>

/* Returns once every reader has left that entered before the call.  New readers use the other
 * counter, so they cannot delay it.  Both counters are waited for: a reader may have loaded the
 * epoch long before it counts itself.  Other writers advance the epoch too, so that one counter
 * may come up twice. */
void uffdaemon_synchronize(struct uffdaemon_readers *readers)
{
    struct timespec pause = {0, 20000};

    for (unsigned empty = 0; empty != 3;) {
        unsigned old = atomic_fetch_add(&readers->epoch, 1) & 1;

        for (unsigned tries = 0; atomic_load(&readers->inside[old]); tries++)
            if (tries < 100)
                sched_yield();
            else
                nanosleep(&pause, NULL);
        empty |= 1u << old;
    }
}
