/*
 * The yardsticks: handlers of missing pages that do nothing but what they must. They receive a
 * userfaultfd over --socket, answer each fault with the same page of --image (a file, mapped
 * and brought in beforehand), and end on SIGTERM, when they write what they used as JSON.
 *
 *   sleeping      poll, read, COPY
 *   re-reading    --rereads N: after an answer read again up to N times before poll
 *   fault-around  --around N: COPY the aligned window of N pages round the fault
 *
 * --gaps additionally notes how long, and how many reads, each next message took to come.
 */
#define _GNU_SOURCE
#include "handed.h"
#include "shared.h"
#include "uffd.h"

#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum pause_kind { PAUSE_YIELD, PAUSE_PAUSE, PAUSE_NONE };

#define MESSAGES 64
#define MAX_GAPS 1000000UL

struct handler {
    int uffd;
    struct handed handed;
    uint64_t around; /* bytes of one answer */
    uint64_t rereads;
    enum pause_kind pause;
    uint64_t *gaps; /* nanoseconds from answer to next message; NULL: not asked for */
    uint64_t *gap_reads;
    size_t gap_count;
    uint64_t faults;
    uint64_t sleeps;
    uint64_t reads;
};

static volatile sig_atomic_t finished;

static void finish(int signal_number)
{
    (void)signal_number;
    finished = 1;
}

static void answer(const struct handler *handler, uint64_t address)
{
    const struct region *region = find_region(&handler->handed, address);
    uint64_t offset = address - region->start;
    offset -= offset % handler->around;
    uint64_t left = region->length - offset;
    struct bench_copy copy = {.len = left < handler->around ? left : handler->around};
    uint64_t end = offset + copy.len;
    while (offset < end) {
        copy.dst = region->start + offset;
        copy.src = region->source + offset;
        copy.len = end - offset;
        copy.copy = 0;
        if (ioctl(handler->uffd, BENCH_IOC_COPY, &copy) == 0) {
            return;
        }
        if (copy.copy > 0) {
            offset += (uint64_t)copy.copy;
        } else if (errno == EEXIST) { /* which does not wake */
            struct bench_range range = {.start = copy.dst, .len = BENCH_PAGE};
            ioctl(handler->uffd, BENCH_IOC_WAKE, &range);
            offset += BENCH_PAGE;
        } else if (errno == ESRCH || finished) {
            return;
        } else if (errno != EAGAIN) {
            die("UFFDIO_COPY");
        }
    }
}

/* One read and its answers; the number of messages, 0 when there was none. */
static size_t drain(struct handler *handler)
{
    struct bench_message messages[MESSAGES];
    ssize_t bytes = read(handler->uffd, messages, sizeof messages);
    handler->reads++;
    if (bytes < 0) {
        if (errno != EAGAIN && errno != EINTR) {
            die("read");
        }
        return 0;
    }
    size_t count = (size_t)bytes / sizeof messages[0];
    for (size_t index = 0; index < count; index++) {
        if (messages[index].event == BENCH_EVENT_PAGEFAULT) {
            answer(handler, messages[index].address & ~(BENCH_PAGE - 1));
            handler->faults++;
        }
    }
    return count;
}

static void wait_between(enum pause_kind kind)
{
    if (kind == PAUSE_YIELD) {
        sched_yield();
    } else if (kind == PAUSE_PAUSE) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
}

static void reread(struct handler *handler)
{
    uint64_t tries = 0;
    uint64_t since = handler->gaps != NULL ? nanoseconds() : 0;
    while (tries < handler->rereads && !finished) {
        wait_between(handler->pause);
        uint64_t before = handler->gaps != NULL ? nanoseconds() : 0;
        tries++;
        if (drain(handler) > 0) {
            if (handler->gaps != NULL && handler->gap_count < MAX_GAPS) {
                handler->gaps[handler->gap_count] = before - since;
                handler->gap_reads[handler->gap_count++] = tries;
                since = nanoseconds();
            }
            tries = 0;
        }
    }
}

static void serve(struct handler *handler, const sigset_t *while_waiting)
{
    struct pollfd ready = {.fd = handler->uffd, .events = POLLIN};
    while (!finished) {
        handler->sleeps++;
        if (ppoll(&ready, 1, NULL, while_waiting) < 0 && errno != EINTR) {
            die("ppoll");
        }
        if (drain(handler) > 0 && handler->rereads > 0) {
            reread(handler);
        }
    }
}

static void report(struct handler *handler)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("{\"faults\": %lu, \"sleeps\": %lu, \"reads\": %lu, \"cpu_s\": %.6f",
           handler->faults, handler->sleeps, handler->reads,
           (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
               + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6);
    if (handler->gaps != NULL) {
        size_t count = handler->gap_count;
        static const double points[] = {10, 50, 90, 99};
        sort_values(handler->gaps, count);
        sort_values(handler->gap_reads, count);
        printf(", \"gaps\": {\"count\": %zu", count);
        for (size_t index = 0; index < sizeof points / sizeof points[0]; index++) {
            printf(", \"p%.0f_us\": %.3f, \"p%.0f_reads\": %lu", points[index],
                   (double)percentile(handler->gaps, count, points[index]) / 1000.0, points[index],
                   percentile(handler->gap_reads, count, points[index]));
        }
        printf("}");
    }
    printf("}\n");
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"socket", 1, NULL, 's'}, {"image", 1, NULL, 'i'},   {"cpu", 1, NULL, 'c'},
        {"rereads", 1, NULL, 'r'}, {"pause", 1, NULL, 'p'},  {"around", 1, NULL, 'a'},
        {"gaps", 0, NULL, 'g'},    {0},
    };
    struct handler handler = {.around = BENCH_PAGE};
    const char *image = NULL;
    int sock = -1;
    int core = -1;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 's': sock = (int)number(optarg, 1 << 20); break;
        case 'i': image = optarg; break;
        case 'c': core = (int)number(optarg, 1 << 20); break;
        case 'r': handler.rereads = number(optarg, 1 << 30); break;
        case 'p':
            handler.pause = strcmp(optarg, "pause") == 0  ? PAUSE_PAUSE
                            : strcmp(optarg, "none") == 0 ? PAUSE_NONE
                                                          : PAUSE_YIELD;
            break;
        case 'a': handler.around = number(optarg, 1 << 20) * BENCH_PAGE; break;
        case 'g':
            handler.gaps = allocate(MAX_GAPS, sizeof *handler.gaps);
            handler.gap_reads = allocate(MAX_GAPS, sizeof *handler.gap_reads);
            break;
        default: return 2;
        }
    }
    /* SIGTERM only comes while waiting, or it would fall between the check and the wait. */
    sigset_t blocked;
    sigset_t while_waiting;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGTERM);
    struct sigaction action = {.sa_handler = finish};
    sigprocmask(SIG_BLOCK, &blocked, &while_waiting);
    sigaction(SIGTERM, &action, NULL);
    pin(core);
    handler.uffd = receive_regions(&handler.handed, sock, image);
    char ready[32];
    int length = snprintf(ready, sizeof ready, "go %d\n", (int)getpid());
    if (write(sock, ready, (size_t)length) != length) {
        die("write");
    }
    serve(&handler, &while_waiting);
    report(&handler);
    return 0;
}
