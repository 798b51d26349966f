#define _GNU_SOURCE
#include "client.h"

#include "shared.h"
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define HUGE_ALIGN (2UL << 20)

static char *map_region(uint64_t length)
{
    char *raw = mmap(NULL, length + 2 * HUGE_ALIGN, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) {
        die("mmap");
    }
    /* The PROT_NONE rest on either side keeps the kernel from merging neighbouring regions. */
    uintptr_t start = ((uintptr_t)raw + HUGE_ALIGN) & ~(HUGE_ALIGN - 1);
    char *region = (char *)start;
    if (mprotect(region, length, PROT_READ | PROT_WRITE) != 0) {
        die("mprotect");
    }
    if (madvise(region, length, MADV_NOHUGEPAGE) != 0 && errno != EINVAL) {
        die("MADV_NOHUGEPAGE");
    }
    return region;
}

static void warm(char *start, uint64_t length)
{
    if (madvise(start, length, MADV_POPULATE_WRITE) != 0
        || madvise(start, length, MADV_DONTNEED) != 0) {
        die("madvise");
    }
}

void prepare(const struct options *options, char **bases, char *text)
{
    uint64_t per_window = pages_per_window(options) * BENCH_PAGE;
    size_t used = (size_t)snprintf(text, MAX_TEXT, "{\"regions\": [");
    for (uint64_t region = 0; region < options->regions; region++) {
        bases[region] = map_region(options->length);
    }
    for (uint64_t region = 0; region < options->regions; region++) {
        used += (size_t)snprintf(text + used, MAX_TEXT - used, "%s[%lu, %lu]",
                                 region ? ", " : "", (uintptr_t)bases[region], options->length);
    }
    /* Neighbouring windows are one: with many small regions the whole image is. */
    int whole = options->windows == 1 && per_window == options->length;
    used += (size_t)snprintf(text + used, MAX_TEXT - used, "], \"windows\": [");
    if (whole) {
        used += (size_t)snprintf(text + used, MAX_TEXT - used, "[0, %lu]",
                                 options->length * options->regions);
    }
    for (uint64_t region = 0; region < options->regions; region++) {
        for (uint64_t window = 0; window < options->windows; window++) {
            uint64_t offset = window * window_spacing(options);
            if (!whole) {
                used += (size_t)snprintf(text + used, MAX_TEXT - used, "%s[%lu, %lu]",
                                         region + window ? ", " : "",
                                         region * options->length + offset, per_window);
            }
            warm(bases[region] + offset, per_window);
        }
    }
    used += (size_t)snprintf(text + used, MAX_TEXT - used, "]}");
    if (used >= MAX_TEXT) {
        errno = E2BIG;
        die("regions");
    }
}

void map_file(const struct options *options, char **bases)
{
    int descriptor = open(options->image, O_RDONLY | O_CLOEXEC);
    char *mapped = MAP_FAILED;
    if (descriptor >= 0) {
        mapped = mmap(NULL, options->regions * options->length, PROT_READ, MAP_SHARED, descriptor,
                      0);
    }
    if (mapped == MAP_FAILED
        || madvise(mapped, options->regions * options->length, MADV_RANDOM) != 0) {
        die(options->image);
    }
    for (uint64_t region = 0; region < options->regions; region++) {
        bases[region] = mapped + region * options->length;
    }
}

int open_registered(const struct options *options, char **bases, uint64_t features)
{
    int uffd = (int)syscall(BENCH_SYS_USERFAULTFD, O_CLOEXEC | O_NONBLOCK);
    struct bench_api api = {.api = BENCH_API_VERSION, .features = features};
    if (uffd < 0 || ioctl(uffd, BENCH_IOC_API, &api) != 0) {
        die("userfaultfd");
    }
    for (uint64_t region = 0; region < options->regions; region++) {
        struct bench_register range = {
            .range = {.start = (uintptr_t)bases[region], .len = options->length},
            .mode = BENCH_REGISTER_MISSING,
        };
        if (ioctl(uffd, BENCH_IOC_REGISTER, &range) != 0) {
            die("UFFDIO_REGISTER");
        }
    }
    return uffd;
}

clockid_t hand_over(const struct options *options, char **bases, const char *text)
{
    int uffd = open_registered(options, bases, 0);
    send_descriptor(options->sock, uffd, text, strlen(text));
    char reply[32] = {0};
    size_t length = 0;
    while (length < sizeof reply - 1 && strchr(reply, '\n') == NULL) {
        ssize_t got = read(options->sock, reply + length, sizeof reply - 1 - length);
        if (got <= 0) {
            errno = got < 0 ? errno : EPIPE;
            die("waiting for go");
        }
        length += (size_t)got;
    }
    clockid_t clock = CLOCK_PROCESS_CPUTIME_ID;
    if (clock_getcpuclockid((pid_t)strtol(reply + 3, NULL, 10), &clock) != 0) {
        die("clock_getcpuclockid");
    }
    return clock;
}
