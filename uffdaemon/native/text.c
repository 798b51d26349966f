/* SPDX-License-Identifier: Apache-2.0 */
/* Lines for standard error, async-signal-safe. */
#include "text.h"

#include <unistd.h>

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

/* Ends the line and writes it in one go. */
void uffdaemon_line_write(struct uffdaemon_line *line)
{
    ssize_t written;

    line->text[line->length++] = '\n';
    written = write(STDERR_FILENO, line->text, line->length);
    (void)written;
    line->length = 0;
}
