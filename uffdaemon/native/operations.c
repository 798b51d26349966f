/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ioctls that resolve faults, one batch at a time.
 *
 * What fs/userfaultfd.c and mm/userfaultfd.c do:
 *  - a positive result with EAGAIN is progress: those bytes are present and woken, and a retry of
 *    the rest returns the real error;
 *  - EAGAIN without progress means that an event is pending.  Only reading it helps, so the error
 *    is returned, and never retried here;
 *  - EEXIST does not wake the thread that waits for the page: issue a WAKE.
 */
#include "operations.h"

#include <errno.h>
#include <sys/ioctl.h>

#include "base.h"

static unsigned char zero_page[UFFDAEMON_LARGEST_PAGE]; /* never written */

static int copy(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode, int64_t *done)
{
    struct uffdio_copy argument = {dst, src, length, mode, 0};
    int error = ioctl(fd, UFFDIO_COPY, &argument) ? errno : 0;
    *done = argument.copy;
    return error;
}

static int move(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode, int64_t *done)
{
    struct uffdio_move argument = {dst, src, length, mode, 0};
    int error = ioctl(fd, UFFDIO_MOVE, &argument) ? errno : 0;
    *done = argument.move;
    return error;
}

static int wake(int fd, uint64_t start, uint64_t length)
{
    struct uffdio_range range = {start, length};
    return ioctl(fd, UFFDIO_WAKE, &range) ? errno : 0;
}

/* One ioctl without a source. */
static UFFDAEMON_HOT int issue_in_place(int fd, const struct uffdaemon_operation *operation,
                                        uint64_t dst, uint64_t length, int64_t *done)
{
    struct uffdio_range range = {dst, length};
    int error = 0;

    *done = 0;
    switch (operation->code) {
    case _UFFDIO_ZEROPAGE: {
        struct uffdio_zeropage argument = {range, operation->mode, 0};
        error = ioctl(fd, UFFDIO_ZEROPAGE, &argument) ? errno : 0;
        *done = argument.zeropage;
        return error;
    }
    case _UFFDIO_CONTINUE: {
        struct uffdio_continue argument = {range, operation->mode, 0};
        error = ioctl(fd, UFFDIO_CONTINUE, &argument) ? errno : 0;
        *done = argument.mapped;
        return error;
    }
    case _UFFDIO_POISON: {
        struct uffdio_poison argument = {range, operation->mode, 0};
        error = ioctl(fd, UFFDIO_POISON, &argument) ? errno : 0;
        *done = argument.updated;
        return error;
    }
    case _UFFDIO_WRITEPROTECT: {
        struct uffdio_writeprotect argument = {range, operation->mode};
        error = ioctl(fd, UFFDIO_WRITEPROTECT, &argument) ? errno : 0;
        break;
    }
    case _UFFDIO_WAKE:
        error = wake(fd, dst, length);
        break;
    default:
        return ENOTTY;
    }
    /* These two have no result field: all or nothing. */
    *done = error ? 0 : (int64_t)length;
    return error;
}

/* One ioctl.  Returns 0 or errno; *done may be -errno as the kernel wrote it. */
static inline int issue(int fd, const struct uffdaemon_operation *operation, uint64_t dst,
                        uint64_t src, uint64_t length, int64_t *done)
{
    if (operation->code == _UFFDIO_COPY)
        return copy(fd, dst, src, length, operation->mode, done);
    if (operation->code == _UFFDIO_MOVE)
        return move(fd, dst, src, length, operation->mode, done);
    return issue_in_place(fd, operation, dst, length, done);
}

/* What ZEROPAGE found present may be only a write-protect marker.  COPY replaces it; keep the
 * protection.  EEXIST again means that there is a page. */
static int zero_marker(int fd, const struct uffdaemon_operation *operation, uint64_t dst)
{
    int64_t done;
    uint64_t mode = UFFDIO_COPY_MODE_WP;

    if (operation->code != _UFFDIO_ZEROPAGE || operation->page_size != uffdaemon_page_size())
        return EEXIST;
    if (operation->mode & UFFDIO_ZEROPAGE_MODE_DONTWAKE)
        mode |= UFFDIO_COPY_MODE_DONTWAKE;
    /* A range not registered for write-protection returns EINVAL, and has no markers. */
    return copy(fd, dst, (uint64_t)(uintptr_t)zero_page, operation->page_size, mode, &done) ? EEXIST
                                                                                            : 0;
}

/* Marks the records of faults on a page that was present already. */
static void note_present(struct uffdaemon_record *records, size_t count, uint64_t page,
                         uint64_t page_size)
{
    for (size_t index = 0; index < count; index++)
        if (records[index].message.arg.pagefault.address - page < page_size)
            records[index].present = 1;
}

/* An ioctl made no progress: skips a page that is present, or stops.  Returns whether to go on. */
static UFFDAEMON_COLD int skip_present(int fd, struct uffdaemon_operation *operation,
                                       struct uffdaemon_record *records, size_t count, int error)
{
    uint64_t dst = operation->dst + operation->done + operation->present;

    /* COPY returns EEXIST as well if it has no huge page to fill: Python looks. */
    if (error != EEXIST || !operation->page_size ||
        (count && operation->page_size != uffdaemon_page_size())) {
        /* Neither progress nor an error: do not spin. */
        operation->error = (uint32_t)(error ? error : EAGAIN);
        return 0;
    }
    if (zero_marker(fd, operation, dst) == 0) {
        operation->done += operation->page_size;
        return 1;
    }
    if (!(operation->mode & UFFDIO_COPY_MODE_DONTWAKE))
        wake(fd, dst, operation->page_size);
    operation->present += operation->page_size;
    note_present(records, count, dst, operation->page_size);
    return 1;
}

/* Carries out one operation, as far as it goes.  The `count` records are the faults that it
 * resolves; there may be none. */
UFFDAEMON_HOT void uffdaemon_carry_out(int fd, struct uffdaemon_operation *operation,
                                       struct uffdaemon_record *records, size_t count)
{
    uint64_t offset = 0;

    operation->error = 0;
    operation->done = operation->present = 0;
    /* At least once, even for a length of 0: the kernel refuses that. */
    do {
        uint64_t src = operation->src ? operation->src + offset : 0;
        int64_t done;
        int error = issue(fd, operation, operation->dst + offset, src, operation->length - offset,
                          &done);

        if (done > 0)
            operation->done += (uint64_t)done;
        else if (!skip_present(fd, operation, records, count, error))
            return;
        offset = operation->done + operation->present;
    } while (offset < operation->length);
}

/* Carries out each operation in turn, and stores its outcome in it.  The next one is tried even
 * if one fails. */
void uffdaemon_execute(int fd, struct uffdaemon_operation *operations, size_t count)
{
    for (size_t index = 0; index < count; index++)
        uffdaemon_carry_out(fd, &operations[index], NULL, 0);
}
