/* Values of every dtype: widening, sums and rounding. Part of kernel.c. */
#include <float.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0 || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs IEEE 754 arithmetic in the precision of its operands, on a little-endian machine"
#endif

#if defined(__has_attribute) && defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#if __has_attribute(target_clones)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef CLONES
#define CLONES /* other systems have no ifunc, and sanitizers start after it */
#endif
#define INLINE static inline __attribute__((always_inline))

/* Elements that are summed together: few enough that sums and inputs stay in the first-level cache. */
#define BLOCK 1024

/* Values at any address: tensors may begin at odd bytes of a file. */
typedef uint8_t __attribute__((may_alias)) u8;
typedef uint16_t __attribute__((aligned(1), may_alias)) u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) u32;
typedef uint64_t __attribute__((aligned(1), may_alias)) u64;
typedef float __attribute__((aligned(1), may_alias)) f32;
typedef double __attribute__((aligned(1), may_alias)) f64;

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE double double_of(int64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int64_t bits_of(double value)
{
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

#define MAGNITUDE INT64_C(0x7FFFFFFFFFFFFFFF)
#define INFINITE INT64_C(0x7FF0000000000000)
#define FRACTION INT64_C(0x000FFFFFFFFFFFFF)

/* ---- dtypes ----------------------------------------------------------------------------------------------------- */

enum { F64, F32, BF16, F16, E5M2, E4M3, E5M2_FNUZ, E4M3_FNUZ, DTYPES };

static const char *const names[DTYPES] = {
    "float64", "float32", "bfloat16", "float16", "float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz",
};
static const int64_t sizes[DTYPES] = {8, 4, 2, 2, 1, 1, 1, 1};

/* A narrow format, as constants of an inlined function. infinity: the code, without the sign bit, of all values above
 * the largest finite one, whose code is one less. The formats of which the names end in "fnuz" have neither infinity
 * nor negative zero, whose code is that of NaN; e4m3 has no infinity, and NaN has its code. */
struct format {
    int bits, mantissa, bias, infinity;
};
#define FORMAT_BF16 ((struct format){16, 7, 127, 0x7F80})
#define FORMAT_F16 ((struct format){16, 10, 15, 0x7C00})
#define FORMAT_E5M2 ((struct format){8, 2, 15, 0x7C})
#define FORMAT_E4M3 ((struct format){8, 3, 7, 0x7F})
#define FORMAT_E5M2_FNUZ ((struct format){8, 2, 16, 0x80})
#define FORMAT_E4M3_FNUZ ((struct format){8, 3, 8, 0x80})
#define HAS_NEGATIVE_ZERO(format) ((format).infinity < 1 << ((format).bits - 1))
#define HAS_INFINITY(format) (HAS_NEGATIVE_ZERO(format) && (format).infinity % (1 << (format).mantissa) == 0)

INLINE int is_infinite(uint32_t code, struct format format)
{
    return HAS_NEGATIVE_ZERO(format) ? (code & ((1u << (format.bits - 1)) - 1)) >= (uint32_t)format.infinity
                                     : code == (uint32_t)format.infinity;
}

/* Widens a code of a format with fewer exponents than float32, exactly. 32-bit integers and one subtraction vectorise
 * everywhere, and no operand is subnormal, which some processors are slow at.
 *
 * A normal number gets float32's exponent bias. A subnormal one, m * 2^(1 - bias - mantissa), is the difference of
 * (1 + m * 2^-mantissa) * 2^(1 - bias) and 2^(1 - bias), both normal in float32; the difference of two neighbours within
 * a factor of two is exact (Sterbenz). */
INLINE float widened(uint32_t code, struct format format)
{
    uint32_t negative = 1u << (format.bits - 1);
    uint32_t magnitude = code & (negative - 1), sign = (code & negative) << (32 - format.bits);
    uint32_t shifted = magnitude << (23 - format.mantissa);
    uint32_t offset = (uint32_t)(127 - format.bias) << 23, least = offset + (1u << 23);
    uint32_t bits = shifted + offset;
    uint32_t subnormal = bits_of_float(float_of(shifted + least) - float_of(least));
    bits = magnitude < (1u << format.mantissa) ? subnormal : bits;
    /* Above the largest finite value, the exponent becomes float32's, and what is left of the mantissa tells NaN from
     * infinity; NaN in place of infinity, or of negative zero, gets a mantissa. */
    uint32_t special = 0x7F800000u | (HAS_INFINITY(format) ? shifted : 0x7FC00000u);
    bits = is_infinite(code, format) ? special : bits;
    return float_of(bits | sign);
}

/* Rounds a float64 to the code of a narrower format: once, to nearest, ties to even. NaN gets the code of an infinity.
 *
 * With 2^e the largest power of two that is not above |value|, or the least normal number if that is larger, the codes
 * next to value are multiples of the unit 2^(e - mantissa). That is the unit in the last place of C = 2^(e + 52 -
 * mantissa), and of |value| + C, since |value| < 2^(e + 1) < C: that addition is the one rounding. The difference of the
 * bits of the sum and of C is the number of units, even if and only if the last bit of the sum is 0; above the least
 * exponent, 2^mantissa of them are the code's exponent of 1, which all exponents above the least add to. */
INLINE uint64_t rounded(double value, struct format format)
{
    int64_t bits = bits_of(value), magnitude = bits & MAGNITUDE;
    int shift = 52 - format.mantissa;
    int64_t least = (int64_t)(1023 + 1 - format.bias) << 52;
    int64_t infinity = ((int64_t)format.infinity << shift) + ((int64_t)(1023 - format.bias) << 52);
    magnitude = magnitude < infinity ? magnitude : infinity;
    int64_t exponent = magnitude & INFINITE;
    exponent = exponent > least ? exponent : least;
    int64_t c = exponent + ((int64_t)shift << 52);
    int64_t units = bits_of(double_of(magnitude) + double_of(c)) - c;
    uint64_t code = (uint64_t)units + ((uint64_t)(exponent - least) >> shift);
    uint64_t sign = ((uint64_t)bits >> (64 - format.bits)) & (UINT64_C(1) << (format.bits - 1));
    if (!HAS_NEGATIVE_ZERO(format))
        sign = code == 0 ? 0 : sign;
    return code | sign;
}

/* Adds an input narrower than float32 to float32 sums; the first one is so widened. */
typedef void (*widen_function)(float *restrict sum, const char *input, int is_first, size_t n);

CLONES static void widen_BF16(float *restrict sum, const char *input, int is_first, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sum[i] = (is_first ? -0.0f : sum[i]) + float_of((uint32_t)((const u16 *)input)[i] << 16);
}

/* In two steps, because compilers otherwise compute with many small integers where a few wide ones are faster. */
#define DEFINE_WIDEN(DTYPE, TYPE)                                                                                      \
    CLONES static void widen_##DTYPE(float *restrict sum, const char *input, int is_first, size_t n)                   \
    {                                                                                                                  \
        uint32_t codes[BLOCK];                                                                                         \
        for (size_t i = 0; i < n; i++)                                                                                 \
            codes[i] = ((const TYPE *)input)[i];                                                                       \
        for (size_t i = 0; i < n; i++)                                                                                 \
            sum[i] = (is_first ? -0.0f : sum[i]) + widened(codes[i], FORMAT_##DTYPE);                                  \
    }
DEFINE_WIDEN(F16, u16)
DEFINE_WIDEN(E5M2, u8)
DEFINE_WIDEN(E4M3, u8)
DEFINE_WIDEN(E5M2_FNUZ, u8)
DEFINE_WIDEN(E4M3_FNUZ, u8)

static widen_function widen[DTYPES] = {
    NULL, NULL, widen_BF16, widen_F16, widen_E5M2, widen_E4M3, widen_E5M2_FNUZ, widen_E4M3_FNUZ,
};

#ifdef __x86_64__
#define F16C __attribute__((target("avx2,f16c")))
typedef int16_t __attribute__((vector_size(32))) sixteen;

/* The same by the instruction that widens float16, subnormal numbers too. */
#define DEFINE_F16C(DTYPE, TYPE, HALVES, FACTOR)                                                                       \
    F16C static void f16c_##DTYPE(float *restrict sum, const char *input, int is_first, size_t n)                      \
    {                                                                                                                  \
        const TYPE *codes = (const TYPE *)input;                                                                       \
        size_t i = 0;                                                                                                  \
        for (; i + 16 <= n; i += 16) {                                                                                 \
            __m256i halves = (__m256i)HALVES(codes + i);                                                               \
            __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves)) * FACTOR;                                     \
            __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)) * FACTOR;                               \
            if (!is_first)                                                                                             \
                low += _mm256_loadu_ps(sum + i), high += _mm256_loadu_ps(sum + i + 8);                                 \
            _mm256_storeu_ps(sum + i, low);                                                                            \
            _mm256_storeu_ps(sum + i + 8, high);                                                                       \
        }                                                                                                              \
        for (; i < n; i++)                                                                                             \
            sum[i] = (is_first ? -0.0f : sum[i]) + widened(codes[i], FORMAT_##DTYPE);                                  \
    }

#define HALVES_F16(codes) _mm256_loadu_si256((const void *)(codes))
DEFINE_F16C(F16, u16, HALVES_F16, 1.0f)

/* A float8_e5m2 is the upper half of a float16. */
#define HALVES_E5M2(codes) ((sixteen)_mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(codes))) << 8)
DEFINE_F16C(E5M2, u8, HALVES_E5M2, 1.0f)

/* A float8_e4m3fn has the bits of a float16, less the exponent's highest and the mantissa's last; the bias of the
 * exponent is larger by 8. Where all bits are set, which is NaN, the exponent's highest is. */
F16C INLINE sixteen halves_E4M3(const u8 *codes)
{
    sixteen halves = (sixteen)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)codes)) << 7 & (int16_t)0xBF80;
    return halves | (((halves & 0x3F80) + 0x80) & 0x4000);
}
DEFINE_F16C(E4M3, u8, halves_E4M3, 256.0f)
#endif

/* Chooses what the processor does in hardware. */
static void choose_instructions(void)
{
#ifdef __x86_64__
    unsigned a, b, c = 0, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C) || !__builtin_cpu_supports("avx2"))
        return;
    widen[F16] = f16c_F16, widen[E5M2] = f16c_E5M2, widen[E4M3] = f16c_E4M3;
#endif
}

/* ---- sums -------------------------------------------------------------------------------------------------------- */

/* The first inputs are added to -0.0, which is neutral: -0.0 + -0.0 is -0.0. */
#define SUM(i) (is_first ? -0.0 : sum[i])

CLONES static void add(double *restrict sum, const void *input, int is_first, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sum[i] = SUM(i) + ((const f32 *)input)[i];
}

/* Adds four inputs in their order, so that the sums are loaded and stored once for four. */
CLONES static void add_four(double *restrict sum, const void *const *inputs, int is_first, size_t n)
{
    const f32 *a = inputs[0], *b = inputs[1], *c = inputs[2], *d = inputs[3];
    for (size_t i = 0; i < n; i++)
        sum[i] = (((SUM(i) + a[i]) + b[i]) + c[i]) + d[i];
}

/* Adds an input times its weight: the product is rounded, then added. */
CLONES static void add_product(double *restrict sum, const double *restrict input, double weight, int is_first, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double product = weight * input[i];
        sum[i] = SUM(i) + product;
    }
}

/* bfloat16 values in pairs, read as words: these are half as many, and to widen is one operation. The sums of the first
 * of each pair come before those of the second. */
#define FIRST(word) float_of((word) << 16)
#define SECOND(word) float_of((word) & 0xFFFF0000u)

CLONES static void add_pairs(double *restrict sum, const void *input, int is_first, size_t n)
{
    const u32 *a = input;
    for (size_t i = 0; i < n / 2; i++) {
        sum[i] = SUM(i) + FIRST(a[i]);
        sum[i + n / 2] = SUM(i + n / 2) + SECOND(a[i]);
    }
}

CLONES static void add_four_pairs(double *restrict sum, const void *const *inputs, int is_first, size_t n)
{
    const u32 *a = inputs[0], *b = inputs[1], *c = inputs[2], *d = inputs[3];
    double *restrict second = sum + n / 2;
    for (size_t i = 0; i < n / 2; i++) {
        sum[i] = (((SUM(i) + FIRST(a[i])) + FIRST(b[i])) + FIRST(c[i])) + FIRST(d[i]);
        second[i] = ((((is_first ? -0.0 : second[i]) + SECOND(a[i])) + SECOND(b[i])) + SECOND(c[i])) + SECOND(d[i]);
    }
}

CLONES static void divide(double *restrict sum, double number, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sum[i] /= number;
}

/* ---- rounding ---------------------------------------------------------------------------------------------------- */

/* Writes the means, which are sum * factor, in the output's dtype. Returns whether any is NaN or infinite there. In two
 * steps, as widening is. */
#define DEFINE_ROUND(DTYPE, TYPE)                                                                                      \
    CLONES static int round_##DTYPE(const double *restrict sum, double factor, char *restrict output, size_t n)        \
    {                                                                                                                  \
        uint32_t codes[BLOCK], found = 0;                                                                              \
        for (size_t i = 0; i < n; i++)                                                                                 \
            codes[i] = (uint32_t)rounded(sum[i] * factor, FORMAT_##DTYPE);                                             \
        for (size_t i = 0; i < n; i++) {                                                                               \
            ((TYPE *)output)[i] = (TYPE)codes[i];                                                                      \
            found |= (uint32_t)is_infinite(codes[i], FORMAT_##DTYPE);                                                  \
        }                                                                                                              \
        return found != 0;                                                                                             \
    }
DEFINE_ROUND(BF16, u16)
DEFINE_ROUND(F16, u16)
DEFINE_ROUND(E5M2, u8)
DEFINE_ROUND(E4M3, u8)
DEFINE_ROUND(E5M2_FNUZ, u8)
DEFINE_ROUND(E4M3_FNUZ, u8)

/* The same for sums of pairs. */
CLONES static int round_pairs(const double *restrict sum, double factor, char *restrict output, size_t n)
{
    uint32_t found = 0;
    for (size_t i = 0; i < n / 2; i++) {
        uint32_t first = (uint32_t)rounded(sum[i] * factor, FORMAT_BF16);
        uint32_t second = (uint32_t)rounded(sum[i + n / 2] * factor, FORMAT_BF16);
        ((u32 *)output)[i] = first | second << 16;
        found |= (uint32_t)is_infinite(first, FORMAT_BF16) | (uint32_t)is_infinite(second, FORMAT_BF16);
    }
    return found != 0;
}

CLONES static int round_F32(const double *restrict sum, double factor, char *restrict output, size_t n)
{
    uint32_t found = 0;
    for (size_t i = 0; i < n; i++) {
        float mean = (float)(sum[i] * factor);
        ((f32 *)output)[i] = mean;
        found |= (bits_of_float(mean) & 0x7FFFFFFFu) >= 0x7F800000u;
    }
    return found != 0;
}

CLONES static int round_F64(const double *restrict sum, double factor, char *restrict output, size_t n)
{
    uint64_t found = 0;
    for (size_t i = 0; i < n; i++) {
        double mean = sum[i] * factor;
        ((f64 *)output)[i] = mean;
        found |= (bits_of(mean) & MAGNITUDE) >= INFINITE;
    }
    return found != 0;
}

typedef int (*round_function)(const double *restrict, double, char *restrict, size_t);
static const round_function round_to[DTYPES] = {
    round_F64, round_F32, round_BF16, round_F16, round_E5M2, round_E4M3, round_E5M2_FNUZ, round_E4M3_FNUZ,
};

/* Which NaN an addition of two NaNs returns depends on the processor; each dtype has one that is written. */
static const uint64_t nans[DTYPES] = {
    UINT64_C(0x7FF8000000000000), 0x7FC00000, 0x7FC0, 0x7E00, 0x7F, 0x7F, 0x80, 0x80,
};

static void write_nans(const double *mean, char *output, size_t n, int dtype)
{
    for (size_t i = 0; i < n; i++) {
        if ((bits_of(mean[i]) & MAGNITUDE) <= INFINITE)
            continue;
        switch (sizes[dtype]) {
        case 8: ((u64 *)output)[i] = nans[dtype]; break;
        case 4: ((u32 *)output)[i] = (uint32_t)nans[dtype]; break;
        case 2: ((u16 *)output)[i] = (uint16_t)nans[dtype]; break;
        default: ((u8 *)output)[i] = (uint8_t)nans[dtype];
        }
    }
}
