/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The journal of a userfaultfd: messages are read straight into a memory file, so that a successor
 * has every event that a process had read when it was killed.
 *
 * The file has a ring of messages.  A read writes at `kept`.  Once its events have been applied,
 * those that the page books do not tell are kept; the others, and the faults, are cleared and
 * overwritten by the next read.  Python saves the regions from time to time, and with them how many
 * messages they include; older ones are free.  A successor applies what was kept since, and then
 * what lies at `kept` and after it: it was read, and perhaps not applied.  Page states only ever
 * gain discards, so an event of the latter kind may be applied twice.
 */
#ifndef UFFDAEMON_JOURNAL_H
#define UFFDAEMON_JOURNAL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "uapi.h"

#define UFFDAEMON_JOURNAL_SLOTS 2048 /* messages */
#define UFFDAEMON_JOURNAL_BATCH 128  /* messages that one read returns at most */
#define UFFDAEMON_JOURNAL_HEAD 512   /* bytes before the ring; the first eight are `kept` */

struct uffdaemon_port;
struct uffdaemon_snapshot;

struct uffdaemon_journal {
    _Atomic uint64_t *kept; /* messages kept since the journal was begun; in the file */
    struct uffd_msg *ring;  /* in the file */
    uint64_t saved;         /* those that the last checkpoint includes; under the port's `change` */
    uint64_t number;        /* of the userfaultfd: tells a keeper whose child it gets */
    int32_t keeper;         /* a socket, gets the descriptors of forked children; or -1 */
};

struct uffdaemon_journal *uffdaemon_journal_open(int fd, uint64_t offset, uint64_t number,
                                                 int keeper, int *error);
void uffdaemon_journal_close(struct uffdaemon_journal *journal);
long uffdaemon_journal_read(const struct uffdaemon_journal *journal, int fd,
                            struct uffd_msg *messages, size_t bytes);
uint64_t uffdaemon_journal_place(const struct uffdaemon_journal *journal, size_t index);
void uffdaemon_journal_keep(struct uffdaemon_journal *journal, size_t count, size_t keep);
void uffdaemon_journal_keep_child(const struct uffdaemon_journal *journal, uint64_t place, int fd);
void uffdaemon_journal_keep_books(const struct uffdaemon_journal *journal, uint64_t place,
                                  const struct uffdaemon_snapshot *snapshot);
void uffdaemon_port_set_journal(struct uffdaemon_port *port, struct uffdaemon_journal *journal);
void uffdaemon_port_saved(struct uffdaemon_port *port, uint64_t place);

#endif
