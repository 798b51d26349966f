/* SPDX-License-Identifier: Apache-2.0 */
/* Signal actions: ours for SIGBUS, and the one before it. */
#define _GNU_SOURCE
#include "sigaction.h"

#include <errno.h>
#include <pthread.h>

static struct sigaction previous;

/* Does what would have happened without our action.  A signal that was sent, by kill(2) say,
 * does not recur: it is ignored if it was before us, and by default ends the process. */
void uffdaemon_sigaction_chain(int number, siginfo_t *info, void *context)
{
    if (previous.sa_flags & SA_SIGINFO)
        previous.sa_sigaction(number, info, context);
    else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
        previous.sa_handler(number);
    else if (info->si_code > 0)
        signal(number, SIG_DFL); /* the access faults again and ends the process */
    else if (previous.sa_handler == SIG_DFL) {
        signal(number, SIG_DFL);
        raise(number); /* blocked until the handler returns */
    }
}

/* Installs `handler` for SIGBUS, with all signals blocked, and `in_child` for every child forked
 * from now on.  0 or -errno; one caller at a time. */
int uffdaemon_sigaction_install(void (*handler)(int, siginfo_t *, void *), void (*in_child)(void))
{
    static int before;
    struct sigaction ours = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    struct sigaction now;

    if (sigaction(SIGBUS, NULL, &now))
        return -errno;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == handler)
        return 0;
    if (!before) {
        int error = pthread_atfork(NULL, NULL, in_child);
        if (error)
            return -error;
        /* Only the first time: a handler installed over ours later chains to ours, and chaining
         * back would loop. */
        previous = now;
        before = 1;
    }
    /* All signals but the one by which the watchdog requests Python stacks. */
    sigfillset(&ours.sa_mask);
    sigdelset(&ours.sa_mask, SIGRTMAX - 1);
    return sigaction(SIGBUS, &ours, NULL) ? -errno : 0;
}

/* Ignores a signal whose action is the default one. */
void uffdaemon_sigaction_ignore(int number)
{
    struct sigaction action;

    if (sigaction(number, NULL, &action) == 0 && !(action.sa_flags & SA_SIGINFO) &&
        action.sa_handler == SIG_DFL)
        signal(number, SIG_IGN);
}
