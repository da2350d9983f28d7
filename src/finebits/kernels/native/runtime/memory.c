/* Working buffers, and large pages: with small ones, the first touch of an output costs more than writing it, and the processor's
 * prefetching of codes ends every 4 KiB. */
#define _GNU_SOURCE
#include "export.h"
#include "runtime/runtime.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Asks for them wherever they fit between p and p + bytes. */
EXPORT void finebits_large_pages(void *p, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = (uintptr_t)1 << 21;
    uintptr_t start = ((uintptr_t)p + page - 1) & ~(page - 1), stop = ((uintptr_t)p + bytes) & ~(page - 1);
    if (start < stop)
        madvise((void *)start, stop - start, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

void *scratch(size_t bytes) {
    void *p = NULL;
    return posix_memalign(&p, 64, bytes + 64) ? NULL : p;
}

/* One buffer is kept for the process; a second caller at the same time gets one of its own. Its size stands before it. */
static _Atomic(void *) kept;

void *borrow(size_t bytes) {
    size_t *p = atomic_exchange(&kept, NULL);
    if (p && p[0] >= bytes)
        return p + 8;
    free(p);
    const size_t page = (size_t)1 << 21, size = bytes + 128 < page ? bytes + 128 : (bytes + 128 + page - 1) / page * page;
    if (posix_memalign((void **)&p, size < page ? 64 : page, size))
        return NULL;
    finebits_large_pages(p, size);
    p[0] = size - 128;
    return p + 8;
}

void give_back(void *p) { free(atomic_exchange(&kept, p ? (size_t *)p - 8 : NULL)); }
