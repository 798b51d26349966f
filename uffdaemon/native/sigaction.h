/* SPDX-License-Identifier: Apache-2.0 */
/* Signal actions: ours for SIGBUS, and the one before it. */
#ifndef UFFDAEMON_SIGACTION_H
#define UFFDAEMON_SIGACTION_H

#include <signal.h>

int uffdaemon_sigaction_install(void (*handler)(int, siginfo_t *, void *), void (*in_child)(void));
void uffdaemon_sigaction_ignore(int number);
void uffdaemon_sigaction_chain(int number, siginfo_t *info, void *context);

#endif
