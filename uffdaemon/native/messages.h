/* SPDX-License-Identifier: Apache-2.0 */
/* Reading messages of a userfaultfd that Python serves by itself. */
#ifndef UFFDAEMON_MESSAGES_H
#define UFFDAEMON_MESSAGES_H

#include <stddef.h>

long uffdaemon_read(int fd, void *messages, size_t bytes, unsigned rereads);

#endif
