/* A kernel for fuzzers, linked in by --wrap: operations on a pipe end as the input says, and time
 * passes by itself. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "fuzz.h"

struct input *fuzz_kernel;
struct uffdaemon_port *fuzz_port;
static uint64_t now;

int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_nanosleep(const struct timespec *pause, struct timespec *rest);
int __wrap_clock_gettime(clockid_t clock, struct timespec *time);

void fuzz_expect(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz: %s\n", what);
    abort();
}

int __wrap_nanosleep(const struct timespec *pause, struct timespec *rest)
{
    (void)rest;
    now += (uint64_t)pause->tv_nsec;
    return 0;
}

int __wrap_clock_gettime(clockid_t clock, struct timespec *time)
{
    (void)clock;
    now += 1000;
    time->tv_sec = (time_t)(now / 1000000000);
    time->tv_nsec = (long)(now % 1000000000);
    return 0;
}

/* The rule that an operation of `length` bytes at `dst` is for. */
static const struct uffdaemon_rule *rule_for(uint64_t dst, uint64_t length)
{
    const struct uffdaemon_table *table = fuzz_port->rules.table;

    for (size_t index = 0; table && index < table->count; index++) {
        const struct uffdaemon_rule *rule = &table->rules[index];

        if (rule->code && dst >= rule->start && dst < rule->end && length <= rule->end - dst &&
            (dst - rule->origin) % rule->page_size == 0 && length % rule->page_size == 0)
            return rule;
    }
    return NULL;
}

int __wrap_ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    uint64_t *argument, length, how;
    int64_t *done;
    int has_source = request == UFFDIO_COPY || request == UFFDIO_MOVE;
    const struct uffdaemon_rule *rule;

    va_start(arguments, request);
    argument = va_arg(arguments, uint64_t *);
    va_end(arguments);
    fuzz_expect(fuzz_kernel != NULL && fd == fuzz_port->fd, "an operation out of place");
    if (request == UFFDIO_WAKE)
        return 0;
    length = argument[has_source ? 2 : 1];
    done = (int64_t *)&argument[has_source ? 4 : 3];
    if (request == UFFDIO_WRITEPROTECT)
        done = NULL;
    rule = rule_for(argument[0], length);
    fuzz_expect(rule != NULL, "an operation that no rule is for");
    fuzz_expect(length > 0, "an operation of no length");
    how = take_bytes(fuzz_kernel, 1);
    if (how >= 128 || !done) { /* all of it, as when there is no input left, but for WRITEPROTECT */
        if (done)
            *done = (int64_t)length;
        return 0;
    }
    switch (how % 8) {
    case 0:
        *done = (int64_t)length;
        return 0;
    case 1: /* a part, as when something is in the way */
    case 2:
        *done = length > rule->page_size ? (int64_t)rule->page_size : -EAGAIN;
        errno = EAGAIN;
        return -1;
    case 3:
    case 4:
        *done = -EEXIST;
        errno = EEXIST;
        return -1;
    case 5:
        errno = ENOENT;
        return -1;
    case 6:
        *done = -EFAULT;
        errno = EFAULT;
        return -1;
    default:
        *done = 0;
        errno = how & 8 ? EAGAIN : ESRCH;
        return -1;
    }
}
