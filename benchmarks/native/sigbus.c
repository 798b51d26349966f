/*
 * The yardstick of resolving in the faulting thread: one process, whose handler of SIGBUS does
 * nothing but copy the page from --image (a file, mapped and brought in beforehand). It takes the
 * toucher's options, touches the same pages in the same order, and writes the same JSON.
 */
#define _GNU_SOURCE
#include "client.h"
#include "shared.h"
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

static int uffd;
static uintptr_t memory;
static uintptr_t source;

static void answer(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    int kept = errno;
    uintptr_t page = (uintptr_t)info->si_addr & ~(BENCH_PAGE - 1);
    struct bench_copy copy = {.dst = page, .src = page - memory + source, .len = BENCH_PAGE};
    while (ioctl(uffd, BENCH_IOC_COPY, &copy) != 0) {
        if (errno == EEXIST) {
            break;
        }
        if (errno != EAGAIN) {
            _exit(3); /* it would fault again for ever */
        }
        copy.copy = 0;
    }
    errno = kept;
}

static void map_image(const struct options *options)
{
    int descriptor = open(options->image, O_RDONLY | O_CLOEXEC);
    char *mapped = MAP_FAILED;
    if (descriptor >= 0) {
        mapped = mmap(NULL, options->length, PROT_READ, MAP_SHARED, descriptor, 0);
    }
    if (mapped == MAP_FAILED || madvise(mapped, options->length, MADV_POPULATE_READ) != 0) {
        die(options->image);
    }
    source = (uintptr_t)mapped;
}

int main(int argc, char **argv)
{
    const struct options options = parse_options(argc, argv);
    if (options.image == NULL || options.regions != 1) {
        errno = EINVAL;
        die("--image, --regions");
    }
    pin(options.core_count ? options.cores[0] : -1);
    char *base = NULL;
    char *text = allocate(MAX_TEXT, 1);
    prepare(&options, &base, text);
    map_image(&options);
    memory = (uintptr_t)base;
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &action, NULL);
    uffd = open_registered(&options, &base, BENCH_FEATURE_SIGBUS);
    touch_and_report(&options, &base, text, MAX_TEXT);
    fputs(text, stdout);
    return 0;
}
