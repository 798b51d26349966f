/* SPDX-License-Identifier: Apache-2.0 */
/* Lines for standard error, async-signal-safe. */
#define _GNU_SOURCE
#include "text.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static _Atomic uint64_t dropped; /* lines */

void uffdaemon_line_add(struct uffdaemon_line *line, const char *text)
{
    while (*text && line->length < sizeof(line->text) - 1)
        line->text[line->length++] = *text++;
}

void uffdaemon_line_add_number(struct uffdaemon_line *line, uint64_t number, unsigned base)
{
    char digits[66];
    unsigned at = sizeof(digits) - 1;

    digits[at] = 0;
    do
        digits[--at] = "0123456789abcdef"[number % base];
    while (number /= base);
    uffdaemon_line_add(line, base == 16 ? "0x" : "");
    uffdaemon_line_add(line, &digits[at]);
}

/* Whether a write to standard error would not block.  For files without RWF_NOWAIT, such as a
 * terminal. */
static int ready(void)
{
    struct pollfd errors = {.fd = STDERR_FILENO, .events = POLLOUT};

    return poll(&errors, 1, 0) == 1 && errors.revents & POLLOUT;
}

static int is_file(void)
{
    struct stat about;

    return fstat(STDERR_FILENO, &about) == 0 && S_ISREG(about.st_mode);
}

/* Writes to standard error without blocking: a full pipe must not stop a thread that resolves or
 * reports faults.  A regular file may wait for its disk.  Returns whether all was written. */
int uffdaemon_write_errors(const char *text, size_t length)
{
    struct iovec all = {(void *)(uintptr_t)text, length};
    ssize_t written = pwritev2(STDERR_FILENO, &all, 1, -1, RWF_NOWAIT);

    if (written < 0 && (errno == EAGAIN ? is_file() : ready()))
        written = write(STDERR_FILENO, text, length);
    return written == (ssize_t)length;
}

/* Ends the line and writes it in one call, or drops it; the next line written tells how many were
 * dropped. */
void uffdaemon_line_write(struct uffdaemon_line *line)
{
    uint64_t before = atomic_exchange(&dropped, 0);

    line->text[line->length++] = '\n';
    if (!uffdaemon_write_errors(line->text, line->length)) {
        atomic_fetch_add(&dropped, before + 1);
    } else if (before) {
        struct uffdaemon_line lost = {.length = 0};

        uffdaemon_line_add(&lost, "uffdaemon: standard error was full; lines lost: ");
        uffdaemon_line_add_number(&lost, before, 10);
        lost.text[lost.length++] = '\n';
        uffdaemon_write_errors(lost.text, lost.length);
    }
    line->length = 0;
}
