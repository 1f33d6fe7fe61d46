/* amx.h - AMX's tile instructions played by plain C, so that any x86-64 with AVX-512 has the row `amx`
 *
 * To include before mft.h's implementation. Tiles are 16 rows of 64 bytes; TDPBF16PS multiplies bf16 and adds in f32.
 * What this cannot show is the hardware's own rounding (it flushes subnormals) and the permission asked of the system. */
#ifndef MFT_TEST_AMX_H
#define MFT_TEST_AMX_H

#include <stdint.h>
#include <string.h>

#define SOFT __attribute__((unused))          /* where there is no such row */

typedef struct soft_tile { float cell[16][16]; } soft_tile;
SOFT static __thread soft_tile soft_tiles[8];          /* as the registers, each thread's own */
SOFT static __thread int       configured;

SOFT static void soft_load(int t, const void *p, int64_t pitch)
{
    int r;
    for (r = 0; r < 16; r++) memcpy(soft_tiles[t].cell[r], (const char *)p + r * pitch, 64);
}
SOFT static void soft_store(int t, void *p, int64_t pitch)
{
    int r;
    for (r = 0; r < 16; r++) memcpy((char *)p + r * pitch, soft_tiles[t].cell[r], 64);
}
SOFT static float soft_bf16(float cell, int high)
{
    uint32_t u;
    float    f;
    memcpy(&u, &cell, 4);
    u = high ? u & 0xffff0000u : u << 16;
    memcpy(&f, &u, 4);
    return f;
}
/* the even and the odd numbers are summed apart, from zero, and only then added to c (Intel SDM, TDPBF16PS) */
SOFT static void soft_product(int c, int a, int b)
{
    int m, n, k;
    if (!configured) return;
    for (m = 0; m < 16; m++) for (n = 0; n < 16; n++) {
        float even = 0, odd = 0;
        for (k = 0; k < 16; k++) {
            even += soft_bf16(soft_tiles[a].cell[m][k], 0) * soft_bf16(soft_tiles[b].cell[k][n], 0);
            odd  += soft_bf16(soft_tiles[a].cell[m][k], 1) * soft_bf16(soft_tiles[b].cell[k][n], 1);
        }
        soft_tiles[c].cell[m][n] += even + odd;
    }
}

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
/* VDPBF16PS: of each lane the odd product, then the even one, is added */
#include <immintrin.h>
__attribute__((target("avx512f"), always_inline)) static inline __m512 soft_dpbf16(__m512 c, __m512 a, __m512 b)
{
    __m512i x = (__m512i)a, y = (__m512i)b, high = _mm512_set1_epi32(-65536);
    c = _mm512_fmadd_ps((__m512)_mm512_and_epi32(x, high), (__m512)_mm512_and_epi32(y, high), c);
    return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(x, 16), (__m512)_mm512_slli_epi32(y, 16), c);
}
#endif

#define MFT__AMX_STAND_IN
#define MFT__AMX_TARGET
#define MFT__TILE_CONFIG(c)          ((void)(c), configured = 1)
#define MFT__TILE_RELEASE()          (configured = 0)
#define MFT__TILE_ZERO(t)            memset(&soft_tiles[t], 0, sizeof soft_tiles[t])
#define MFT__TILE_LOAD(t, p, pitch)  soft_load(t, p, pitch)
#define MFT__TILE_STORE(t, p, pitch) soft_store(t, p, pitch)
#define MFT__TILE_BF16(c, a, b)      soft_product(c, a, b)
#define MFT__DPBF16(c, a, b)         soft_dpbf16(c, a, b)

#endif
