/* SPDX-License-Identifier: Apache-2.0 */
/* Runs the resolver's thread on the core of the threads whose faults it resolves. */
#ifndef UFFDAEMON_AFFINITY_H
#define UFFDAEMON_AFFINITY_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

void uffdaemon_affinity_search(unsigned reads, uint64_t now);
void uffdaemon_affinity_give_up(uint64_t now);
void uffdaemon_affinity_follow(uint64_t *faults, pid_t thread, size_t count, uint64_t now);

#endif
