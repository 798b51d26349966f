/*
 * The little of include/uapi/linux/userfaultfd.h that a handler of missing pages needs, defined
 * here so that the yardstick depends on nothing: neither on the distribution's header, which is
 * older than the kernel, nor on the library it is a yardstick for.
 */
#ifndef BENCH_UFFD_H
#define BENCH_UFFD_H

#include <stdint.h>
#include <sys/ioctl.h>

#define BENCH_SYS_USERFAULTFD 323 /* x86-64; the other architectures that matter say 282 */
#ifdef __aarch64__
#undef BENCH_SYS_USERFAULTFD
#define BENCH_SYS_USERFAULTFD 282
#endif

#define BENCH_API_VERSION 0xAAULL
#define BENCH_EVENT_PAGEFAULT 0x12
#define BENCH_REGISTER_MISSING 1ULL
#define BENCH_FEATURE_SIGBUS (1ULL << 7)

struct bench_api {
    uint64_t api;
    uint64_t features;
    uint64_t ioctls;
};

struct bench_range {
    uint64_t start;
    uint64_t len;
};

struct bench_register {
    struct bench_range range;
    uint64_t mode;
    uint64_t ioctls;
};

struct bench_copy {
    uint64_t dst;
    uint64_t src;
    uint64_t len;
    uint64_t mode;
    int64_t copy; /* bytes done, or -errno */
};

struct bench_move {
    uint64_t dst;
    uint64_t src;
    uint64_t len;
    uint64_t mode;
    int64_t move; /* bytes done, or -errno */
};

struct bench_message {
    uint8_t event;
    uint8_t reserved[7];
    uint64_t flags;
    uint64_t address;
    uint32_t thread;
    uint32_t padding;
};

_Static_assert(sizeof(struct bench_api) == 24, "uffdio_api");
_Static_assert(sizeof(struct bench_range) == 16, "uffdio_range");
_Static_assert(sizeof(struct bench_register) == 32, "uffdio_register");
_Static_assert(sizeof(struct bench_copy) == 40, "uffdio_copy");
_Static_assert(sizeof(struct bench_move) == 40, "uffdio_move");
_Static_assert(sizeof(struct bench_message) == 32, "uffd_msg");

#define BENCH_IOC_API _IOWR(0xAA, 0x3F, struct bench_api)
#define BENCH_IOC_REGISTER _IOWR(0xAA, 0x00, struct bench_register)
#define BENCH_IOC_WAKE _IOR(0xAA, 0x02, struct bench_range)
#define BENCH_IOC_COPY _IOWR(0xAA, 0x03, struct bench_copy)
#define BENCH_IOC_MOVE _IOWR(0xAA, 0x05, struct bench_move)

#endif
