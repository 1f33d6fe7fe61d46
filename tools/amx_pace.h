/* amx_pace.h - AMX's tile instructions as others that take as long: the pace of the row `amx` on a machine without it
 *
 *   make bench-amx-pace       products of that row, at about the speed they would have; their numbers mean nothing
 *
 * Included before mft.h. A tile's load or store is sixteen of a whole vector, from the same addresses, so caches and memory
 * work as they would. A product of tiles keeps its unit for 16 cycles: so long takes a division of 8 doubles on Golden
 * Cove, which like it is one instruction and leaves the ports for loads and stores alone. What this cannot show are
 * the tiles' own latencies and the clock that a core keeps under them. */
#ifndef MFT_AMX_PACE_H
#define MFT_AMX_PACE_H

#include <stdint.h>

#define MFT__AMX_STAND_IN
#define MFT__AMX_TARGET              __attribute__((target("avx512f,avx512vl")))
#define MFT__TILE_CONFIG(c)          ((void)(c))
#define MFT__TILE_RELEASE()          ((void)0)
#define MFT__TILE_ZERO(t)            ((void)(t))
#define MFT__TILE_LOAD(t, p, pitch)  amx_pace_load((const char *)(p), pitch)
#define MFT__TILE_STORE(t, p, pitch) amx_pace_store((char *)(p), pitch)
#define MFT__TILE_BF16(c, a, b) \
    __asm__ __volatile__("vpxor %%xmm15, %%xmm15, %%xmm15\n\tvdivpd %0, %%zmm15, %%zmm14" : : "m"(amx_pace_ones) : "xmm14", "xmm15")

static const double amx_pace_ones[8] = { 1, 1, 1, 1, 1, 1, 1, 1 };

#define AMX_PACE_FOUR(op) op("(%0)") op("(%0,%1)") op("(%0,%1,2)") op("(%0,%2)") "lea (%0,%1,4), %0\n\t"
#define AMX_PACE_IN(at)   "vmovups " at ", %%zmm16\n\t"
#define AMX_PACE_OUT(at)  "vmovups %%zmm16, " at "\n\t"

__attribute__((target("avx512f"), always_inline, unused)) static inline void amx_pace_load(const char *p, int64_t pitch)
{
    __asm__ __volatile__(AMX_PACE_FOUR(AMX_PACE_IN) AMX_PACE_FOUR(AMX_PACE_IN) AMX_PACE_FOUR(AMX_PACE_IN) AMX_PACE_FOUR(AMX_PACE_IN)
                         : "+r"(p) : "r"(pitch), "r"(3 * pitch) : "memory", "xmm16");
}

__attribute__((target("avx512f"), always_inline, unused)) static inline void amx_pace_store(char *p, int64_t pitch)
{
    __asm__ __volatile__("vpxord %%zmm16, %%zmm16, %%zmm16\n\t"
                         AMX_PACE_FOUR(AMX_PACE_OUT) AMX_PACE_FOUR(AMX_PACE_OUT) AMX_PACE_FOUR(AMX_PACE_OUT) AMX_PACE_FOUR(AMX_PACE_OUT)
                         : "+r"(p) : "r"(pitch), "r"(3 * pitch) : "memory", "xmm16");
}

#endif
