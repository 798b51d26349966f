/* SPDX-License-Identifier: Apache-2.0 */
/* Wakes the watchdog's thread: something waits for Python, or a userfaultfd was added. */
#define _GNU_SOURCE
#include "alarm.h"

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

static _Atomic uint32_t raised; /* the futex; there is one watchdog per process */

/* From any thread, and from signal handlers. */
void uffdaemon_alarm_raise(void)
{
    if (!atomic_exchange(&raised, 1))
        syscall(SYS_futex, &raised, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL, NULL, 0);
}

/* Call it before checking what the alarm is about. */
void uffdaemon_alarm_clear(void)
{
    atomic_store(&raised, 0);
}

/* Returns once it is raised; may return spuriously. */
void uffdaemon_alarm_wait(void)
{
    syscall(SYS_futex, &raised, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 0, NULL, NULL, 0);
}
