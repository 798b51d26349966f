/* SPDX-License-Identifier: Apache-2.0 */
/* The journal of a userfaultfd: a ring of messages in a memory file. */
#define _GNU_SOURCE
#include "journal.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base.h"
#include "messages.h"
#include "port.h"
#include "snapshot.h"
#include "text.h"

#define SLOTS UFFDAEMON_JOURNAL_SLOTS
#define BATCH UFFDAEMON_JOURNAL_BATCH
#define SIZE (UFFDAEMON_JOURNAL_HEAD + SLOTS * sizeof(struct uffd_msg))
_Static_assert(SLOTS % BATCH == 0 && SLOTS > 2 * BATCH, "UFFDAEMON_JOURNAL_SLOTS");
_Static_assert(BATCH == UFFDAEMON_MESSAGES, "UFFDAEMON_JOURNAL_BATCH");

static struct uffd_msg *slot(const struct uffdaemon_journal *journal, uint64_t place)
{
    return &journal->ring[place % SLOTS];
}

/* What a predecessor had read and not yet kept: it is kept now. */
static void keep_what_was_read(struct uffdaemon_journal *journal)
{
    uint64_t kept = atomic_load(journal->kept);
    size_t count = 0;

    for (size_t index = 0; index < BATCH; index++)
        if (slot(journal, kept + index)->event)
            count = index + 1;
    uffdaemon_journal_keep(journal, count, count);
}

/* Maps the journal at `offset` of a memory file.  Nothing counts as saved but what Python says
 * (`uffdaemon_port_saved`).  NULL on failure, with an errno in *error. */
struct uffdaemon_journal *uffdaemon_journal_open(int fd, uint64_t offset, uint64_t number,
                                                 int keeper, int *error)
{
    struct uffdaemon_journal *journal = uffdaemon_alloc(sizeof(*journal));
    char *mapped;

    *error = ENOMEM;
    if (!journal)
        return NULL;
    mapped = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)offset);
    if (mapped == MAP_FAILED) {
        *error = errno;
        uffdaemon_free(journal);
        return NULL;
    }
    mlock(mapped, SIZE); /* if permitted: a message whose page cannot be brought back is lost */
    journal->kept = (void *)mapped;
    journal->ring = (void *)(mapped + UFFDAEMON_JOURNAL_HEAD);
    journal->number = number;
    journal->keeper = keeper;
    keep_what_was_read(journal);
    return journal;
}

void uffdaemon_journal_close(struct uffdaemon_journal *journal)
{
    if (!journal)
        return;
    munmap((void *)journal->kept, SIZE);
    uffdaemon_free(journal);
}

/* As `uffdaemon_read_pending`, through the journal.  ENOBUFS: it is full until Python saves. */
long uffdaemon_journal_read(const struct uffdaemon_journal *journal, int fd,
                            struct uffd_msg *messages, size_t bytes)
{
    uint64_t kept = atomic_load_explicit(journal->kept, memory_order_relaxed);
    size_t contiguous = (SLOTS - kept % SLOTS) * sizeof(*messages);
    long count;

    /* Also after this read, those that the next one may write to are free. */
    if (kept - journal->saved > SLOTS - 2 * BATCH) {
        errno = ENOBUFS;
        return -1;
    }
    count = uffdaemon_read_pending(fd, slot(journal, kept),
                                   bytes < contiguous ? bytes : contiguous);
    if (count > 0)
        memcpy(messages, slot(journal, kept), (size_t)count);
    return count;
}

/* The place of message `index` of the batch that was read last: the number of messages that are
 * kept, once it is the last of them. */
uint64_t uffdaemon_journal_place(const struct uffdaemon_journal *journal, size_t index)
{
    return atomic_load_explicit(journal->kept, memory_order_relaxed) + index + 1;
}

/* The events of a batch of `count` messages have been applied.  The first `keep` messages are
 * kept. At every instruction, what a successor would find is either kept, or in the BATCH slots
 * from `kept` on; those are zero otherwise. */
void uffdaemon_journal_keep(struct uffdaemon_journal *journal, size_t count, size_t keep)
{
    uint64_t kept = atomic_load_explicit(journal->kept, memory_order_relaxed);

    for (size_t index = keep; index < count; index++)
        memset(slot(journal, kept + index), 0, sizeof(struct uffd_msg));
    for (size_t index = 0; index < keep; index++)
        memset(slot(journal, kept + BATCH + index), 0, sizeof(struct uffd_msg));
    atomic_store_explicit(journal->kept, kept + keep, memory_order_release);
}

/* Sends a descriptor to the keeper, as what belongs to the child of the FORK event at `place`. Does
 * not wait: if the keeper is late, Python tries again. */
static void send_to_keeper(const struct uffdaemon_journal *journal, const char *what,
                           uint64_t place, int fd)
{
    struct uffdaemon_line line = {.length = 0};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec part = {line.text, 0};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes)};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);

    uffdaemon_line_add(&line, "keep ");
    uffdaemon_line_add(&line, what);
    uffdaemon_line_add(&line, " ");
    uffdaemon_line_add_number(&line, journal->number, 10);
    uffdaemon_line_add(&line, " ");
    uffdaemon_line_add_number(&line, place, 10);
    part.iov_len = line.length;
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(head), &fd, sizeof(fd));
    sendmsg(journal->keeper, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* A FORK event was read.  If this process is killed, the child's last descriptor is closed, and its
 * missing pages become zeros: so the keeper gets it at once. */
void uffdaemon_journal_keep_child(const struct uffdaemon_journal *journal, uint64_t place, int fd)
{
    if (journal->keeper >= 0)
        send_to_keeper(journal, "child", place, fd);
}

/* The same event has been applied.  The child's pages are as they were then, and the parent's
 * books go on changing. */
void uffdaemon_journal_keep_books(const struct uffdaemon_journal *journal, uint64_t place,
                                  const struct uffdaemon_snapshot *snapshot)
{
    int fd = journal->keeper >= 0 && snapshot ? uffdaemon_snapshot_write(snapshot) : -1;

    if (fd < 0)
        return;
    send_to_keeper(journal, "books", place, fd);
    close(fd);
}

/* Before anything serves the port. */
void uffdaemon_port_set_journal(struct uffdaemon_port *port, struct uffdaemon_journal *journal)
{
    port->journal = journal;
}

/* A checkpoint includes the first `place` messages that were kept. */
void uffdaemon_port_saved(struct uffdaemon_port *port, uint64_t place)
{
    uffdaemon_lock(&port->change);
    if (port->journal && place > port->journal->saved)
        port->journal->saved = place;
    uffdaemon_unlock(&port->change);
}
