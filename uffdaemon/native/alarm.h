/* SPDX-License-Identifier: Apache-2.0 */
/* Wakes the watchdog's thread.  Async-signal-safe, except for the wait. */
#ifndef UFFDAEMON_ALARM_H
#define UFFDAEMON_ALARM_H

void uffdaemon_alarm_raise(void);
void uffdaemon_alarm_clear(void);
void uffdaemon_alarm_wait(void);

#endif
