/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The C interface to Python.
 *
 * Conventions: a function returns 0 or a count, or -errno; progress is returned in out-parameters
 * or in the structures passed in.  No Python.h.  The caller owns every descriptor and address,
 * before and after the call.  cffi releases the GIL around each call, and nothing here ever waits
 * for it.
 *
 * Global state:
 *   sigbus.c    the ports whose faulting threads resolve faults, and the ranges of former ones: a
 *               signal handler has no argument for them
 *   sigaction.c the action for SIGBUS before ours, and whether this is a forked child
 *   table.c     how often any table of rules was replaced, for the same handler
 *   watchdog.c  the watches, and the process that the watchdog's thread runs in
 *   stall.c     the reports to write, and the pipe from which stacks are read
 *   text.c      how many lines were dropped because standard error was full
 *   alarm.c     the futex on which the watchdog's thread sleeps
 *   affinity.c  per resolver thread: its affinity, and its search for a core
 */
#ifndef UFFDAEMON_NATIVE_H
#define UFFDAEMON_NATIVE_H

#include "affinity.h"
#include "back_pressure.h"
#include "base.h"
#include "descriptor.h"
#include "epoll.h"
#include "events.h"
#include "execute.h"
#include "journal.h"
#include "mapping.h"
#include "messages.h"
#include "moves.h"
#include "operations.h"
#include "pace.h"
#include "pages.h"
#include "port.h"
#include "postponed.h"
#include "reading.h"
#include "resolver.h"
#include "rules.h"
#include "serve.h"
#include "sigaction.h"
#include "sigbus.h"
#include "snapshot.h"
#include "stall.h"
#include "watchdog.h"

#endif
