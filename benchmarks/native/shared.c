#define _GNU_SOURCE
#include "shared.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

_Noreturn void die(const char *what)
{
    fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror(errno));
    exit(1);
}

uint64_t number(const char *text, uint64_t largest)
{
    char *end = NULL;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || value > largest) {
        errno = EINVAL;
        die(text);
    }
    return value;
}

void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (memory == NULL) {
        die("calloc");
    }
    return memory;
}

void pin(int core)
{
    if (core < 0) {
        return;
    }
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET((size_t)core, &cores);
    if (sched_setaffinity(0, sizeof cores, &cores) != 0) {
        die("sched_setaffinity");
    }
}

size_t parse_cores(const char *text, int *cores, size_t capacity)
{
    char *copy = strdup(text);
    size_t count = 0;
    if (copy == NULL) {
        die("strdup");
    }
    for (char *word = strtok(copy, ","); word != NULL; word = strtok(NULL, ",")) {
        if (count == capacity) {
            errno = E2BIG;
            die(text);
        }
        cores[count++] = (int)number(word, CPU_SETSIZE - 1);
    }
    free(copy);
    return count;
}

void send_descriptor(int sock, int descriptor, const char *message, size_t length)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = (void *)(uintptr_t)message, .iov_len = length};
    struct msghdr header = {
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = control.space,
        .msg_controllen = sizeof control.space,
    };
    struct cmsghdr *attached = CMSG_FIRSTHDR(&header);
    attached->cmsg_level = SOL_SOCKET;
    attached->cmsg_type = SCM_RIGHTS;
    attached->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(attached), &descriptor, sizeof(int));
    ssize_t sent = sendmsg(sock, &header, MSG_NOSIGNAL);
    if (sent < 0 || (size_t)sent != length) {
        die("sendmsg");
    }
}

int receive_descriptor(int sock, char *message, size_t capacity)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = message, .iov_len = capacity - 1};
    struct msghdr header = {
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = control.space,
        .msg_controllen = sizeof control.space,
    };
    ssize_t length = recvmsg(sock, &header, MSG_CMSG_CLOEXEC);
    struct cmsghdr *attached = length <= 0 ? NULL : CMSG_FIRSTHDR(&header);
    if (attached == NULL || attached->cmsg_type != SCM_RIGHTS || (header.msg_flags & MSG_CTRUNC)) {
        die("recvmsg: no descriptor");
    }
    message[length] = '\0';
    int descriptor = -1;
    memcpy(&descriptor, CMSG_DATA(attached), sizeof(int));
    return descriptor;
}

uint64_t percentile(const uint64_t *sorted, size_t count, double percent)
{
    if (count == 0) {
        return 0;
    }
    size_t index = (size_t)((double)(count - 1) * percent / 100.0 + 0.5);
    return sorted[index];
}

static int ascending(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left;
    uint64_t b = *(const uint64_t *)right;
    return a < b ? -1 : a > b;
}

void sort_values(uint64_t *values, size_t count)
{
    qsort(values, count, sizeof *values, ascending);
}
