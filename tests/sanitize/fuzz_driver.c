/* Runs a fuzzer's entry where there is no libFuzzer: `fuzzer ROUNDS [FILE...]` runs the files, and then
 * inputs that are random, or earlier ones with a few bytes changed, always the same. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

#define LONGEST 600

static uint64_t next(void)
{
    static uint64_t seed = 88172645463325252;

    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

static void run_file(const char *name)
{
    static uint8_t data[1 << 16];
    FILE *file = fopen(name, "rb");
    size_t size = file ? fread(data, 1, sizeof(data), file) : 0;

    fuzz_expect(file != NULL, name);
    fclose(file);
    LLVMFuzzerTestOneInput(data, size);
}

int main(int count, char **arguments)
{
    static uint8_t data[LONGEST];
    size_t size = 0;

    for (int index = 2; index < count; index++)
        run_file(arguments[index]);
    for (long round = 0; count > 1 && round < atol(arguments[1]); round++) {
        if (next() % 8 == 0) {
            size = next() % LONGEST;
            for (size_t index = 0; index < size; index++)
                data[index] = (uint8_t)next();
        }
        for (uint64_t changes = next() % 8; size && changes; changes--)
            data[next() % size] = (uint8_t)next();
        LLVMFuzzerTestOneInput(data, size);
    }
    return 0;
}
