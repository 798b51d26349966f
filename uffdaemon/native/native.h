/* SPDX-License-Identifier: Apache-2.0 */
/*
 * All that the C side offers to Python.
 *
 * Conventions: a function returns 0 or a count, or -errno; progress comes back in out-parameters or
 * in the structures handed in.  No Python.h.  Every descriptor and every address belongs to the
 * caller, before and after the call.  cffi releases the GIL around each call, and nothing here ever
 * waits for it.
 *
 * State that is not handed in:
 *   sigbus.c    the ports whose faulting threads resolve faults, and the ranges of those that have
 *               ended: a signal handler is handed nothing
 *   sigaction.c the action for SIGBUS before ours, and whether this is a forked child
 *   table.c     how often any table of rules was replaced, for the same handler
 *   watchdog.c  the watches, and the process whose thread looks after them
 *   stall.c     what that thread is to write, and the pipe that it has stacks from
 *   text.c      how many lines standard error had no room for
 *   alarm.c     the futex on which that thread sleeps
 *   affinity.c  of each resolver's thread: where it may run, and its search for a core
 */
#ifndef UFFDAEMON_NATIVE_H
#define UFFDAEMON_NATIVE_H

#include "affinity.h"
#include "base.h"
#include "descriptor.h"
#include "epoll.h"
#include "events.h"
#include "mapping.h"
#include "messages.h"
#include "moves.h"
#include "operations.h"
#include "pace.h"
#include "pages.h"
#include "port.h"
#include "resolver.h"
#include "rules.h"
#include "serve.h"
#include "sigaction.h"
#include "sigbus.h"
#include "snapshot.h"
#include "stall.h"
#include "watchdog.h"

#endif
