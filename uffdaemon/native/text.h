/* SPDX-License-Identifier: Apache-2.0 */
/* Lines for standard error, for places where printf may not be called. */
#ifndef UFFDAEMON_TEXT_H
#define UFFDAEMON_TEXT_H

#include <stddef.h>
#include <stdint.h>

struct uffdaemon_line {
    char text[400];
    unsigned length;
};

void uffdaemon_line_add(struct uffdaemon_line *line, const char *text);
void uffdaemon_line_add_number(struct uffdaemon_line *line, uint64_t number, unsigned base);
int uffdaemon_write_errors(const char *text, size_t length);
void uffdaemon_line_write(struct uffdaemon_line *line);

#endif
