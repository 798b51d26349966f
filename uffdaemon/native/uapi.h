/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The userfaultfd and PAGEMAP_SCAN uAPI, up to Linux 7.3.
 *
 * Own definitions: the headers of a distribution are as old as its release (Debian 12 knows neither
 * POISON nor MOVE), while the kernel that runs may be newer.  What the running kernel has is found
 * out at run time.  Source: include/uapi/linux/userfaultfd.h, include/uapi/linux/fs.h; names are
 * the kernel's, so this header must not be included together with <linux/userfaultfd.h>.
 */
#ifndef UFFDAEMON_UAPI_H
#define UFFDAEMON_UAPI_H

#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define UFFD_API 0xAAULL
#define UFFDIO 0xAA
#define UFFD_USER_MODE_ONLY 1

#define UFFD_FEATURE_PAGEFAULT_FLAG_WP (1ULL << 0)
#define UFFD_FEATURE_EVENT_FORK (1ULL << 1)
#define UFFD_FEATURE_EVENT_REMAP (1ULL << 2)
#define UFFD_FEATURE_EVENT_REMOVE (1ULL << 3)
#define UFFD_FEATURE_MISSING_HUGETLBFS (1ULL << 4)
#define UFFD_FEATURE_MISSING_SHMEM (1ULL << 5)
#define UFFD_FEATURE_EVENT_UNMAP (1ULL << 6)
#define UFFD_FEATURE_SIGBUS (1ULL << 7)
#define UFFD_FEATURE_THREAD_ID (1ULL << 8)
#define UFFD_FEATURE_MINOR_HUGETLBFS (1ULL << 9)
#define UFFD_FEATURE_MINOR_SHMEM (1ULL << 10)
#define UFFD_FEATURE_EXACT_ADDRESS (1ULL << 11)
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1ULL << 12)
#define UFFD_FEATURE_WP_UNPOPULATED (1ULL << 13)
#define UFFD_FEATURE_POISON (1ULL << 14)
#define UFFD_FEATURE_WP_ASYNC (1ULL << 15)
#define UFFD_FEATURE_MOVE (1ULL << 16)
#define UFFD_FEATURE_RWP (1ULL << 17)       /* 7.3 */
#define UFFD_FEATURE_RWP_ASYNC (1ULL << 18) /* 7.3 */

#define _UFFDIO_REGISTER 0x00
#define _UFFDIO_UNREGISTER 0x01
#define _UFFDIO_WAKE 0x02
#define _UFFDIO_COPY 0x03
#define _UFFDIO_ZEROPAGE 0x04
#define _UFFDIO_MOVE 0x05
#define _UFFDIO_WRITEPROTECT 0x06
#define _UFFDIO_CONTINUE 0x07
#define _UFFDIO_POISON 0x08
#define _UFFDIO_RWPROTECT 0x09 /* 7.3 */
#define _UFFDIO_SET_MODE 0x0A  /* 7.3 */
#define _UFFDIO_API 0x3F

struct uffdio_range {
    uint64_t start, len;
};

struct uffdio_api {
    uint64_t api, features, ioctls;
};

struct uffdio_register {
    struct uffdio_range range;
    uint64_t mode, ioctls;
};

#define UFFDIO_REGISTER_MODE_MISSING (1ULL << 0)
#define UFFDIO_REGISTER_MODE_WP (1ULL << 1)
#define UFFDIO_REGISTER_MODE_MINOR (1ULL << 2)
#define UFFDIO_REGISTER_MODE_RWP (1ULL << 3) /* 7.3 */

/* The result fields are signed and carry -errno; argument errors leave them untouched. */
struct uffdio_copy {
    uint64_t dst, src, len, mode;
    int64_t copy;
};
#define UFFDIO_COPY_MODE_DONTWAKE (1ULL << 0)
#define UFFDIO_COPY_MODE_WP (1ULL << 1)

struct uffdio_zeropage {
    struct uffdio_range range;
    uint64_t mode;
    int64_t zeropage;
};
#define UFFDIO_ZEROPAGE_MODE_DONTWAKE (1ULL << 0)

struct uffdio_move {
    uint64_t dst, src, len, mode;
    int64_t move;
};
#define UFFDIO_MOVE_MODE_DONTWAKE (1ULL << 0)
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES (1ULL << 1)

struct uffdio_writeprotect {
    struct uffdio_range range;
    uint64_t mode;
};
#define UFFDIO_WRITEPROTECT_MODE_WP (1ULL << 0)
#define UFFDIO_WRITEPROTECT_MODE_DONTWAKE (1ULL << 1)

struct uffdio_continue {
    struct uffdio_range range;
    uint64_t mode;
    int64_t mapped;
};
#define UFFDIO_CONTINUE_MODE_DONTWAKE (1ULL << 0)
#define UFFDIO_CONTINUE_MODE_WP (1ULL << 1)

struct uffdio_poison {
    struct uffdio_range range;
    uint64_t mode;
    int64_t updated;
};
#define UFFDIO_POISON_MODE_DONTWAKE (1ULL << 0)

#define UFFDIO_API _IOWR(UFFDIO, _UFFDIO_API, struct uffdio_api)
#define UFFDIO_REGISTER _IOWR(UFFDIO, _UFFDIO_REGISTER, struct uffdio_register)
#define UFFDIO_UNREGISTER _IOR(UFFDIO, _UFFDIO_UNREGISTER, struct uffdio_range)
#define UFFDIO_WAKE _IOR(UFFDIO, _UFFDIO_WAKE, struct uffdio_range)
#define UFFDIO_COPY _IOWR(UFFDIO, _UFFDIO_COPY, struct uffdio_copy)
#define UFFDIO_ZEROPAGE _IOWR(UFFDIO, _UFFDIO_ZEROPAGE, struct uffdio_zeropage)
#define UFFDIO_MOVE _IOWR(UFFDIO, _UFFDIO_MOVE, struct uffdio_move)
#define UFFDIO_WRITEPROTECT _IOWR(UFFDIO, _UFFDIO_WRITEPROTECT, struct uffdio_writeprotect)
#define UFFDIO_CONTINUE _IOWR(UFFDIO, _UFFDIO_CONTINUE, struct uffdio_continue)
#define UFFDIO_POISON _IOWR(UFFDIO, _UFFDIO_POISON, struct uffdio_poison)
#define USERFAULTFD_IOC_NEW _IO(UFFDIO, 0x00)

#define UFFD_EVENT_PAGEFAULT 0x12
#define UFFD_EVENT_FORK 0x13
#define UFFD_EVENT_REMAP 0x14
#define UFFD_EVENT_REMOVE 0x15
#define UFFD_EVENT_UNMAP 0x16

#define UFFD_PAGEFAULT_FLAG_WRITE (1 << 0)
#define UFFD_PAGEFAULT_FLAG_WP (1 << 1)
#define UFFD_PAGEFAULT_FLAG_MINOR (1 << 2)
#define UFFD_PAGEFAULT_FLAG_RWP (1 << 3) /* 7.3 */

struct uffd_msg {
    uint8_t event;
    uint8_t reserved1;
    uint16_t reserved2;
    uint32_t reserved3;
    union {
        struct {
            uint64_t flags, address;
            union {
                uint32_t ptid;
            } feat;
        } pagefault;
        struct {
            uint32_t ufd;
        } fork;
        struct {
            uint64_t from, to, len;
        } remap;
        struct {
            uint64_t start, end;
        } remove;
        struct {
            uint64_t reserved1, reserved2, reserved3;
        } reserved;
    } arg;
} __attribute__((packed));

/* PAGEMAP_SCAN, Linux 6.7: Documentation/admin-guide/mm/pagemap.rst */
struct page_region {
    uint64_t start, end, categories;
};

struct pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)
#define PAGE_IS_WPALLOWED (1 << 0)
#define PAGE_IS_WRITTEN (1 << 1)
#define PAGE_IS_FILE (1 << 2)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PAGE_IS_PFNZERO (1 << 5)
#define PAGE_IS_HUGE (1 << 6)
#define PAGE_IS_SOFT_DIRTY (1 << 7)
#define PAGE_IS_GUARD (1 << 8)

_Static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg");
_Static_assert(offsetof(struct uffd_msg, arg) == 8, "uffd_msg.arg");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.address) == 16, "uffd_msg address");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.feat.ptid) == 24, "uffd_msg ptid");
_Static_assert(sizeof(struct uffdio_api) == 24, "uffdio_api");
_Static_assert(sizeof(struct uffdio_register) == 32, "uffdio_register");
_Static_assert(sizeof(struct uffdio_copy) == 40, "uffdio_copy");
_Static_assert(sizeof(struct uffdio_zeropage) == 32, "uffdio_zeropage");
_Static_assert(sizeof(struct uffdio_move) == 40, "uffdio_move");
_Static_assert(sizeof(struct uffdio_writeprotect) == 24, "uffdio_writeprotect");
_Static_assert(sizeof(struct uffdio_continue) == 32, "uffdio_continue");
_Static_assert(sizeof(struct uffdio_poison) == 32, "uffdio_poison");
_Static_assert(sizeof(struct pm_scan_arg) == 96, "pm_scan_arg");
_Static_assert(UFFDIO_COPY == 0xC028AA03, "UFFDIO_COPY");
_Static_assert(UFFDIO_MOVE == 0xC028AA05, "UFFDIO_MOVE");
_Static_assert(UFFDIO_WAKE == 0x8010AA02, "UFFDIO_WAKE");

#endif
