/* What the fuzzers share: input taken byte by byte, and a kernel that answers as the input says. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

#include "native.h"

#define FUZZ_BASE UINT64_C(0x10000000)
#define FUZZ_PAGE UINT64_C(4096)

struct input {
    const uint8_t *data;
    size_t left;
};

/* 0 once the input is used up. */
static inline uint64_t take_bytes(struct input *input, unsigned count)
{
    uint64_t value = 0;

    for (; count && input->left; count--, input->left--)
        value = value << 8 | *input->data++;
    return value;
}

/* fuzz_kernel.c: what ioctl(2) does about the next operations; NULL: nothing is expected. */
extern struct input *fuzz_kernel;
extern struct uffdaemon_port *fuzz_port;
void fuzz_expect(int holds, const char *what);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
#endif
