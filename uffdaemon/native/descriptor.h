/* SPDX-License-Identifier: Apache-2.0 */
/* Opening userfaultfds, the handshake, and registered ranges.  All return -errno on failure. */
#ifndef UFFDAEMON_DESCRIPTOR_H
#define UFFDAEMON_DESCRIPTOR_H

#include <stdint.h>

int uffdaemon_open_syscall(int user_mode_only);
int uffdaemon_open_device(int user_mode_only);
int uffdaemon_handshake(int fd, uint64_t *features, uint64_t *ioctls);
int uffdaemon_register(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *ioctls);
int uffdaemon_unregister(int fd, uint64_t start, uint64_t length);
int uffdaemon_pidfd_open(int pid);
int uffdaemon_pidfd_getfd(int pidfd, int target);
int uffdaemon_memfd_create(const char *name, uint64_t huge_page_size);

#endif
