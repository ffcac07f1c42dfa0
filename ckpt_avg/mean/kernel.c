/* The native engine: the mean of one block of elements in one call, without the interpreter lock.
 *
 * For each element it widens the inputs to float64, adds them in checkpoint order, divides once by their number, and
 * rounds once to the output's dtype; or does what gives the same bytes in less time. The torch engine (arithmetic.py) gives
 * the same bytes, too. This file is compiled without contraction to FMA and without fast-math: a compiler that keeps the
 * order of IEEE 754 operations cannot change a bit of the result, and the vector instructions that `target_clones` selects
 * at run time cannot either.
 *
 * Nothing is allocated: the caller passes a table with a row for each input, and memory for the inputs that are not
 * mapped. What Python passes is checked before the lock is released.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <fenv.h>
#include <float.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
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

/* In the thread-local block of the program itself, so that a signal handler can use it: a library's own block may be
 * allocated at its first use. musl has no room there for libraries that are loaded later. */
#ifdef __GLIBC__
#define THREAD_LOCAL static __thread __attribute__((tls_model("initial-exec")))
#else
#define THREAD_LOCAL static __thread
#endif

/* Elements that are summed together: few enough that sums and inputs stay in the first-level cache. */
#define BLOCK 1024
#define EXACT_BLOCK 256 /* for float64, which needs more buffers */

#define READ_TOGETHER (1024 * 1024) /* bytes of all windows together: they stay in the cache of a core … */
#define READ_LEAST (64 * 1024)      /* … unless one would get smaller than this: a system call takes time */
#define ADVISED (128 * 1024)        /* Linux may load no more for one call: mm/readahead.c, force_page_cache_ra */

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

enum { F64, F32, BF16, F16, E5M2, E4M3, E5M2_FNUZ, E4M3_FNUZ, DTYPES }; /* float8 from E5M2 on */

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

/* ---- widening ---------------------------------------------------------------------------------------------------- */

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
#define AVX2 __attribute__((target("avx2")))
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
CLONES static void add_product(double *restrict sum, const double *restrict input, double weight, int is_first,
                               size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double product = weight * input[i];
        sum[i] = SUM(i) + product;
    }
}

CLONES static void divide(double *restrict sum, double number, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sum[i] /= number;
}

/* ---- rounding ---------------------------------------------------------------------------------------------------- */

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

/* The same for a float32 that is within the range of the format, with half as many bits to compute. */
INLINE uint32_t rounded_float(float value, struct format format)
{
    uint32_t bits = bits_of_float(value), magnitude = bits & 0x7FFFFFFFu;
    int shift = 23 - format.mantissa;
    uint32_t least = (uint32_t)(127 + 1 - format.bias) << 23;
    uint32_t exponent = magnitude & 0x7F800000u;
    exponent = exponent > least ? exponent : least;
    uint32_t c = exponent + ((uint32_t)shift << 23);
    uint32_t units = bits_of_float(float_of(magnitude) + float_of(c)) - c;
    uint32_t code = units + ((exponent - least) >> shift);
    uint32_t sign = (bits >> (32 - format.bits)) & (1u << (format.bits - 1));
    if (!HAS_NEGATIVE_ZERO(format))
        sign = code == 0 ? 0 : sign;
    return code | sign;
}

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

/* The same for the quotients of float32 sums that are within the range of the format. */
#define DEFINE_ROUND_FLOAT(DTYPE)                                                                                      \
    CLONES static void round_float_##DTYPE(const float *restrict sum, float number, u8 *restrict output, size_t n)     \
    {                                                                                                                  \
        uint32_t codes[BLOCK];                                                                                         \
        for (size_t i = 0; i < n; i++)                                                                                 \
            codes[i] = rounded_float(sum[i] / number, FORMAT_##DTYPE);                                                 \
        for (size_t i = 0; i < n; i++)                                                                                 \
            output[i] = (u8)codes[i];                                                                                  \
    }
DEFINE_ROUND_FLOAT(E5M2)
DEFINE_ROUND_FLOAT(E4M3)
DEFINE_ROUND_FLOAT(E5M2_FNUZ)
DEFINE_ROUND_FLOAT(E4M3_FNUZ)

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

/* ---- float64 inputs ---------------------------------------------------------------------------------------------- */

/* A float64 sum of float64 inputs rounds at every step, and can overflow. Here the mean is exact and rounded once. The
 * sum is kept in two numbers, high + low, and so is the quotient; what these lose is bounded. Where the bound leaves two
 * numbers to round to, the mean is computed with integers (`exact_mean`). */

/* The rounded sum of two numbers; `rest` becomes what rounding has lost, exactly (TwoSum: Knuth, The Art of Computer
 * Programming, vol. 2, section 4.2.2, theorem B). */
INLINE double two_sum(double a, double b, double *rest)
{
    double sum = a + b, kept = sum - a;
    *rest = (a - (sum - kept)) + (b - kept);
    return sum;
}

/* dividend - quotient * number, exactly, for a quotient that was rounded, and at most 2^26 inputs: of the 53 bits of the
 * quotient, 26 and 27 are multiplied separately, so that no product rounds. */
INLINE double remainder_of(double dividend, double quotient, double number)
{
    double upper = double_of(bits_of(quotient) & ~INT64_C(0x7FFFFFF));
    return (dividend - upper * number) - (quotient - upper) * number;
}

/* Adds an input; `different` collects the bits in which inputs differ from the first. */
CLONES static void add_exactly(double *restrict high, double *restrict low, double *restrict lost,
                               int64_t *restrict different, const double *restrict first,
                               const double *restrict input, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double rest;
        high[i] = two_sum(high[i], input[i], &rest);
        low[i] = two_sum(low[i], rest, &rest);
        lost[i] += double_of(bits_of(rest) & MAGNITUDE);
        different[i] |= bits_of(input[i]) ^ bits_of(first[i]);
    }
}

/* Divides the sums. The mean is quotient + correction: nearest, or cut with the last bit set where anything was lost
 * (round to odd), which makes a later rounding to a narrower format right. `unsure` is not zero where the bound on what
 * was lost does not decide, or where a step may have underflowed or overflowed; twice what was lost, and the rounding of
 * the correction, covers the rounding of the bound itself. */
CLONES static void divide_exactly(double *restrict high, const double *restrict low, const double *restrict lost,
                                  int64_t *restrict unsure, double number, int to_odd, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double rest, more, left;
        double sum = two_sum(high[i], low[i], &rest);
        double quotient = sum / number;
        double little = two_sum(remainder_of(sum, quotient, number), rest, &more);
        double correction = little / number;
        double missing = lost[i] + double_of(bits_of(more) & MAGNITUDE);
        int64_t inexact = (missing != 0) | (remainder_of(little, correction, number) != 0);
        double size = double_of(bits_of(correction) & MAGNITUDE);
        double bound = inexact ? missing / number * 2 + size * 0x1p-50 : 0;
        double mean = two_sum(quotient, correction, &left);
        int64_t open = quotient + (correction + bound) != quotient + (correction - bound);
        open |= inexact & (size < 0x1p-960);
        int64_t bits = bits_of(mean);
        open |= (bits & MAGNITUDE) >= INFINITE;
        if (to_odd) {
            int64_t beyond = (left != 0) & ((bits_of(left) ^ bits) < 0); /* the mean is farther from zero than it is */
            open |= inexact & (double_of(bits_of(left) & MAGNITUDE) <= bound);
            bits = (bits - beyond) | inexact | (left != 0);
        }
        high[i] = double_of(bits);
        unsure[i] = open;
    }
}

/* A sum of float64 values as an integer, in units of the smallest subnormal one, 2^-1074: 2,098 bits for one value, and
 * 32 more for up to 2^32 of them. */
#define DIGITS 68

struct integer {
    uint32_t digits[DIGITS]; /* the lowest first */
};

static void add_magnitude(struct integer *sum, double value)
{
    uint64_t bits = (uint64_t)(bits_of(value) & MAGNITUDE), fraction = bits & FRACTION, exponent = bits >> 52;
    uint64_t shift = exponent ? exponent - 1 : 0, carry = 0;
    fraction |= exponent ? UINT64_C(1) << 52 : 0;
    uint32_t within = (uint32_t)(shift % 32);
    uint64_t low = fraction << within, high = within ? fraction >> (64 - within) : 0; /* 53 + 31 bits */
    uint32_t parts[3] = {(uint32_t)low, (uint32_t)(low >> 32), (uint32_t)high};
    for (size_t i = shift / 32, k = 0; i < DIGITS && (k < 3 || carry); i++, k++) {
        carry += (uint64_t)sum->digits[i] + (k < 3 ? parts[k] : 0);
        sum->digits[i] = (uint32_t)carry;
        carry >>= 32;
    }
}

/* larger - smaller, in place */
static void subtract(struct integer *larger, const struct integer *smaller)
{
    int64_t borrow = 0;
    for (size_t i = 0; i < DIGITS; i++) {
        borrow += (int64_t)larger->digits[i] - (int64_t)smaller->digits[i];
        larger->digits[i] = (uint32_t)borrow;
        borrow >>= 32; /* 0 or -1: every compiler shifts in copies of the sign */
    }
}

static int is_smaller(const struct integer *a, const struct integer *b)
{
    for (size_t i = DIGITS; i-- > 0;)
        if (a->digits[i] != b->digits[i])
            return a->digits[i] < b->digits[i];
    return 0;
}

INLINE uint64_t bit_of(const struct integer *value, int64_t bit)
{
    return bit < 0 ? 0 : value->digits[bit / 32] >> bit % 32 & 1;
}

/* The float64 nearest to sum / number, or cut to odd. A float64's bits, as an integer, are those of its significand plus
 * 2^52 times the shift that makes it a multiple of the unit. */
static double quotient_of(struct integer *sum, uint32_t number, int to_odd)
{
    uint64_t rest = 0;
    int64_t top = -1; /* the highest bit of the quotient */
    for (size_t i = DIGITS; i-- > 0;) {
        uint64_t dividend = rest << 32 | sum->digits[i];
        sum->digits[i] = (uint32_t)(dividend / number);
        rest = dividend % number;
        for (int bit = 31; top < 0 && bit >= 0; bit--)
            if (sum->digits[i] >> bit & 1)
                top = (int64_t)i * 32 + bit;
    }
    int64_t shift = top > 52 ? top - 52 : 0;
    uint64_t bits = 0;
    for (int64_t bit = shift + 52; bit >= shift; bit--)
        bits = bits << 1 | bit_of(sum, bit);
    bits += (uint64_t)shift << 52;
    int is_half = shift ? bit_of(sum, shift - 1) != 0 : 2 * rest >= number;
    int is_more = shift ? rest != 0 : 2 * rest != number && rest != 0; /* than the half, or than nothing */
    for (int64_t bit = shift - 2; bit >= 0 && !is_more; bit--)
        is_more = bit_of(sum, bit) != 0;
    if (to_odd)
        bits |= is_half || is_more;
    else
        bits += is_half && (is_more || (bits & 1));
    return double_of((int64_t)bits);
}

/* ---- the inputs of one call -------------------------------------------------------------------------------------- */

enum { MEMORY, MAP, READ }; /* where an input is: in a slot of the caller's memory, or in a file to map, or to read */

/* A row of the caller's table. */
struct input {
    int64_t where, descriptor, offset, dtype, position; /* position: of its slot, if it is not mapped */
    int64_t address;           /* of the window's first element; set here, like what follows */
    int64_t mapping, nmapping; /* the mapped pages of the window; none if nmapping is 0 */
};

enum { CHECK_FINITE = 1, CHECK_RANGE = 2 };
enum { DONE, NOT_FINITE, OUT_OF_RANGE, NOT_MAPPED, NOT_READ, LOST };

struct job {
    struct input *inputs;
    const f64 *weights; /* one for each input; NULL if all count the same */
    int64_t number, elements, slot;
    char *memory, *output;
    int64_t only;    /* the dtype of all inputs, or -1 */
    int has_float64; /* whether one of them is */
    int has_maps;    /* whether one is mapped */
    int dtype, check; /* check: CHECK_FINITE, CHECK_RANGE or both; NaN and Inf are accepted otherwise */
    int what; /* the result: one of the above, */
    int64_t index, code; /* the element or the input, and errno, */
    double value; /* and the mean that is out of range */
    volatile int64_t lost; /* the number of an input, counted from 1, of which a mapped page is gone */
};

/* ---- mapped pages that are gone ---------------------------------------------------------------------------------- */

/* If a file is truncated, or its disk fails, reading a mapped page raises SIGBUS, in the thread that reads. The handler
 * maps zeros in place of the window's pages, so that the read succeeds, and notes the input; the call then returns LOST.
 * That needs no jump out of the arithmetic, and mmap is one system call. Any other fault goes to the handler that was
 * there before. */
THREAD_LOCAL struct job *current; /* what this thread computes */
THREAD_LOCAL int passing_on;      /* whether a fault is with the handler that was there before */
static struct sigaction before;

static void pass_on(int number, siginfo_t *information, void *context)
{
    if (!passing_on && (before.sa_flags & SA_SIGINFO) && before.sa_sigaction != NULL) {
        passing_on = 1;
        before.sa_sigaction(number, information, context);
        passing_on = 0;
    } else if (!passing_on && before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        passing_on = 1;
        before.sa_handler(number);
        passing_on = 0;
    } else {
        signal(number, SIG_DFL); /* the same read faults again, and ends the process */
        if (information->si_code <= 0)
            raise(number); /* no read: another process sent it */
    }
}

static void on_fault(int number, siginfo_t *information, void *context)
{
    struct job *job = current;
    uintptr_t address = (uintptr_t)information->si_addr;
    for (int64_t i = 0; job != NULL && i < job->number; i++) {
        const struct input *input = &job->inputs[i];
        uintptr_t begin = (uintptr_t)input->mapping;
        if (input->where == MAP && address - begin < (uintptr_t)input->nmapping) {
            int saved = errno;
            void *zeros = mmap((void *)begin, (size_t)input->nmapping, PROT_READ,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            errno = saved;
            if (zeros != MAP_FAILED) {
                job->lost = i + 1;
                return;
            }
        }
    }
    pass_on(number, information, context);
}

/* Installs the handler, again if another has taken its place. The interpreter lock is held. */
static int watch_faults(void)
{
    struct sigaction now, ours;
    if (sigaction(SIGBUS, NULL, &now) != 0)
        return -1;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault)
        return 0;
    before = now;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK | SA_RESTART;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, NULL);
}

/* ---- windows ----------------------------------------------------------------------------------------------------- */

static int fail(struct job *job, int what, int64_t index, int64_t code)
{
    job->what = what, job->index = index, job->code = code;
    return -1;
}

static void close_windows(struct job *job)
{
    for (int64_t i = 0; i < job->number; i++) {
        struct input *input = &job->inputs[i];
        if (input->nmapping)
            munmap((void *)(intptr_t)input->mapping, (size_t)input->nmapping);
        input->nmapping = 0;
    }
}

static int read_window(struct job *job, int64_t i, int64_t offset, int64_t length)
{
    struct input *input = &job->inputs[i];
    char *slot = job->memory + input->position;
    input->address = (intptr_t)slot;
    for (int64_t done = 0; done < length;) {
        ssize_t count = pread((int)input->descriptor, slot + done, (size_t)(length - done), offset + done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return fail(job, count < 0 ? NOT_READ : LOST, i, count < 0 ? errno : 0);
        done += count;
    }
    return 0;
}

static int map_window(struct job *job, int64_t i, int64_t offset, int64_t length)
{
    struct input *input = &job->inputs[i];
    int64_t extra = offset % sysconf(_SC_PAGESIZE);
    void *mapping =
        mmap(NULL, (size_t)(extra + length), PROT_READ, MAP_SHARED, (int)input->descriptor, offset - extra);
    if (mapping == MAP_FAILED)
        return fail(job, NOT_MAPPED, i, errno);
    input->mapping = (intptr_t)mapping;
    input->nmapping = extra + length;
    input->address = input->mapping + extra;
    return 0;
}

/* Makes elements [first, first + n) of every input readable at `address`. */
static int open_windows(struct job *job, int64_t first, int64_t n)
{
    for (int64_t i = 0; i < job->number; i++) {
        struct input *input = &job->inputs[i];
        int64_t size = sizes[input->dtype];
        if (input->where == MEMORY)
            input->address = (intptr_t)(job->memory + input->position + first * size);
        else if ((input->where == MAP ? map_window : read_window)(job, i, input->offset + first * size, n * size) != 0)
            return -1;
    }
    return 0;
}

/* ---- the mean of one window -------------------------------------------------------------------------------------- */

static const char *stored(const struct input *input, size_t first)
{
    return (const char *)(intptr_t)input->address + first * (size_t)sizes[input->dtype];
}

/* Where the values of one input are as float32: in place, or in `buffer`. */
static const void *values_of(const struct input *input, size_t first, size_t n, float *buffer)
{
    if (input->dtype == F32)
        return stored(input, first);
    widen[input->dtype](buffer, stored(input, first), 1, n);
    return buffer;
}

#ifdef __x86_64__
/* The code of the mean of one element. */
static u16 mean_code(const struct job *job, size_t element)
{
    double sum = -0.0;
    for (int64_t k = 0; k < job->number; k++)
        sum += float_of((uint32_t)*(const u16 *)stored(&job->inputs[k], element) << 16);
    return (u16)rounded(sum / (double)job->number, FORMAT_BF16);
}

/* Rounds finite float32 values to bfloat16, in the upper halves of the bits. What is below has no meaning, nor has what
 * becomes of others. */
AVX2 INLINE __m256i upper_halves(__m256 values)
{
    __m256i bits = (__m256i)values, is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), is_odd);
}

/* Computes the means of 32 elements, a cache line of each input, in float32; c is explained below. Returns two bits for
 * each element, set where the mean may be wrong. Values are read in pairs, as words, so that to widen is one operation. */
AVX2 INLINE uint64_t means_of_words(const struct job *job, size_t first, int c, u16 *output)
{
    const __m256i magnitude = _mm256_set1_epi16(0x7FFF), exponent = _mm256_set1_epi16(0x7F80);
    const __m256i one = _mm256_set1_epi16(1), spread = _mm256_set1_epi16((int16_t)((16 - c) << 7));
    const __m256i most = _mm256_set1_epi16((int16_t)((254 - c) << 7));
    __m256 low[2], high[2];       /* sums of the first and of the second of each pair */
    __m256i largest[2], least[2]; /* codes of each element without their signs; the least of all but zero, less one */
    uint64_t sure = 0;
    for (int half = 0; half < 2; half++) {
        low[half] = high[half] = _mm256_set1_ps(-0.0f);
        largest[half] = _mm256_setzero_si256(), least[half] = _mm256_set1_epi16(-1);
    }
    for (int64_t k = 0; k < job->number; k++) {
        const char *input = (const char *)(intptr_t)job->inputs[k].address + 2 * first;
        __builtin_prefetch((const void *)((uintptr_t)input + 2 * BLOCK)); /* for the next block */
        for (int half = 0; half < 2; half++) {
            __m256i words = _mm256_loadu_si256((const void *)(input + 32 * half));
            __m256i codes = _mm256_and_si256(words, magnitude);
            largest[half] = _mm256_max_epu16(largest[half], codes);
            least[half] = _mm256_min_epu16(least[half], _mm256_sub_epi16(codes, one)); /* zero becomes the largest */
            low[half] += (__m256)_mm256_slli_epi32(words, 16);
            high[half] += (__m256)_mm256_and_si256(words, _mm256_set1_epi32(-0x10000));
        }
    }
    float number = (float)job->number, reciprocal = 1.0f / number;
    for (int half = 0; half < 2; half++) {
        if (job->number == 1 << c)
            low[half] *= reciprocal, high[half] *= reciprocal; /* the same, in less time */
        else
            low[half] /= number, high[half] /= number;
        __m256i firsts = _mm256_srli_epi32(upper_halves(low[half]), 16), seconds = upper_halves(high[half]);
        _mm256_storeu_si256((void *)(output + 16 * half), _mm256_blend_epi16(firsts, seconds, 0xAA));
        __m256i bound = _mm256_min_epu16(_mm256_adds_epu16(_mm256_adds_epu16(least[half], one), spread), most);
        __m256i beyond = _mm256_subs_epu16(_mm256_and_si256(largest[half], exponent), bound);
        __m256i is_sure = _mm256_cmpeq_epi16(beyond, _mm256_setzero_si256());
        sure |= (uint64_t)(uint32_t)_mm256_movemask_epi8(is_sure) << 32 * half;
    }
    return ~sure;
}

/* Computes n means, n being a multiple of 32, where all inputs and the output are bfloat16, and writes them: in float32
 * those whose sums are exact there, the others in float64, one by one. Returns 0 if more than one in 32 is not exact, one
 * is not finite, or the inputs are so many that few would be exact: then all have to be written again.
 *
 * For one element, let N be the number of inputs, e and f the exponents, as coded, of the largest and the least |x| but
 * for zeros (if all are zero, so is the sum), and q the last place of the least: 2^(f - 134), or 2^-133 if it is
 * subnormal. All x are multiples of q, and so are their sums. With N <= 2^c and e - f <= 16 - c,
 * N * |x| < 2^(c + e - 126) <= 2^24 * q, so the sums are exact in float32; with e <= 254 - c they do not overflow.
 *
 * The quotient of the whole sum S, rounded to float32 and then to bfloat16, is the same as without the first rounding.
 * S / N lies between two powers of two, or below the least normal number. Float32 contains these, so the first rounding
 * does not pass them. Let u be the last place of bfloat16 there; the first rounding moves S / N by at most 2^-17 * u. A
 * number h half-way between neighbouring codes there is a multiple of u / 2. If u / 2 <= q, S - N * h is a multiple of
 * u / 2, so S / N is h or at least u / (2 * N) away, which is more than 2^-17 * u as N < 2^16. Otherwise S / N is not
 * subnormal, since q is at least the last place of subnormal numbers, and the first rounding moves it by at most
 * 2^-24 * |S / N| < q / N; h is a multiple of q, and S / N is h or at least q / N away. So the first rounding neither
 * crosses nor reaches h, unless S / N is h, which float32 contains.
 *
 * The same is true in float64, with smaller errors, so both give the mean rounded once; a zero has the same sign, because
 * every sum is the same number. */
AVX2 static int avx2_bfloat16(const struct job *job, size_t first, size_t n, u16 *output)
{
    int c = 0, left = (int)n / 32;
    while (job->number > INT64_C(1) << c)
        c++;
    for (size_t i = 0; i < n && c <= 12; i += 32) {
        uint64_t unsure = means_of_words(job, first + i, c, output + i);
        while (unsure) {
            int bit = __builtin_ctzll(unsure);
            size_t element = i + (size_t)bit / 2;
            output[element] = mean_code(job, first + element);
            if (left-- == 0 || is_infinite(output[element], FORMAT_BF16))
                return 0;
            unsure &= ~(UINT64_C(3) << bit);
        }
    }
    return c <= 12;
}
#endif

/* The same; NULL on other processors. */
static int (*write_bfloat16)(const struct job *job, size_t first, size_t n, u16 *output);

/* The largest of the codes, without their signs, and of `largest`; that of negative zero counts as `negative_zero`. */
CLONES static u8 largest_code(const u8 *codes, size_t n, u8 negative_zero, u8 largest)
{
    for (size_t i = 0; i < n; i++) {
        u8 magnitude = codes[i] == 0x80 ? negative_zero : codes[i] & 0x7F;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* Sums float8 inputs in float32. Returns their largest code; 0xFF if one is NaN in place of negative zero. */
static u8 sum_float8(const struct job *job, size_t first, size_t n, float *restrict sum)
{
    u8 largest = 0, negative_zero = job->only == E5M2 || job->only == E4M3 ? 0 : 0xFF;
    for (int64_t k = 0; k < job->number; k++) {
        const char *codes = stored(&job->inputs[k], first);
        largest = largest_code((const u8 *)codes, n, negative_zero, largest);
        widen[job->only](sum, codes, k == 0, n);
    }
    return largest;
}

#ifdef __x86_64__
/* The same, n being a multiple of 64, with the sums in registers; widens as f16c_E5M2 and f16c_E4M3 do. NaN needs no care,
 * because sums with it are not used. A cache line of each input at a time: inputs often have equal places in their pages,
 * so many of them push each other out of the first-level cache. */
F16C INLINE u8 f16c_sum(const struct job *job, size_t first, size_t n, float *restrict sum, int shift, int mask,
                        float factor)
{
    u8 all[16], found = 0;
    __m128i largest = _mm_setzero_si128();
    for (size_t i = 0; i < n; i += 64) {
        __m256 sums[8];
        for (int part = 0; part < 8; part++)
            sums[part] = _mm256_set1_ps(-0.0f);
        for (int64_t k = 0; k < job->number; k++) {
            const char *input = stored(&job->inputs[k], first + i);
            __builtin_prefetch((const void *)((uintptr_t)input + n)); /* for the next call */
            for (int part = 0; part < 4; part++) {
                __m128i codes = _mm_loadu_si128((const void *)(input + 16 * part));
                largest = _mm_max_epu8(largest, _mm_and_si128(codes, _mm_set1_epi8(0x7F)));
                __m256i halves = (__m256i)((sixteen)_mm256_cvtepi8_epi16(codes) << shift & (int16_t)mask);
                sums[2 * part] += _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
                sums[2 * part + 1] += _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
            }
        }
        for (int part = 0; part < 8; part++)
            _mm256_storeu_ps(sum + i + 8 * part, sums[part] * factor);
    }
    _mm_storeu_si128((void *)all, largest);
    for (int i = 0; i < 16; i++)
        found = all[i] > found ? all[i] : found;
    return found;
}

F16C static u8 f16c_sum_E5M2(const struct job *job, size_t first, size_t n, float *restrict sum)
{
    return f16c_sum(job, first, n, sum, 8, 0xFFFF, 1.0f);
}

F16C static u8 f16c_sum_E4M3(const struct job *job, size_t first, size_t n, float *restrict sum)
{
    return f16c_sum(job, first, n, sum, 7, 0xBFFF, 256.0f);
}
#endif

/* A float8 format: its smallest positive number, and what computes with it. */
static struct float8 {
    struct format format;
    float least;
    u8 (*sum)(const struct job *job, size_t first, size_t n, float *restrict sum); /* n is a multiple of 64 */
    void (*round)(const float *restrict sum, float number, u8 *restrict output, size_t n);
} float8[DTYPES] = {
    [E5M2] = {FORMAT_E5M2, 0x1p-16f, sum_float8, round_float_E5M2},
    [E4M3] = {FORMAT_E4M3, 0x1p-9f, sum_float8, round_float_E4M3},
    [E5M2_FNUZ] = {FORMAT_E5M2_FNUZ, 0x1p-17f, sum_float8, round_float_E5M2_FNUZ},
    [E4M3_FNUZ] = {FORMAT_E4M3_FNUZ, 0x1p-10f, sum_float8, round_float_E4M3_FNUZ},
};

/* Chooses what the processor does in hardware. */
static void choose_instructions(void)
{
#ifdef __x86_64__
    unsigned a, b, c = 0, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C) || !__builtin_cpu_supports("avx2"))
        return;
    widen[F16] = f16c_F16, widen[E5M2] = f16c_E5M2, widen[E4M3] = f16c_E4M3;
    float8[E5M2].sum = f16c_sum_E5M2, float8[E4M3].sum = f16c_sum_E4M3;
    write_bfloat16 = avx2_bfloat16;
#endif
}

/* Sums inputs of one float8 format in float32. Returns whether the sums are exact, and their quotients, rounded to float32
 * and then to that format, are the same as without the first rounding.
 *
 * Both hold if number * |x| < 2^24 * q for all inputs x, and number < 2^20, where q is the smallest positive number of the
 * format. All inputs are multiples of q, and so are their sums; those below 2^24 * q are exact in float32. The quotient of
 * the whole sum S is at most the largest |x|, so it is rounded to float32 by at most 2^-24 * |x| < q / number. A number
 * half-way between two codes is a multiple of q. If S / number is not that number, it is at least q / number away from it,
 * so the rounded quotient is on the same side of it, and gets the same code. If S / number is half-way itself, float32
 * contains it. Half-way between codes that are q apart, a number is a multiple of q / 2 alone, and q / (2 * number) away;
 * but such codes are at most 16 * q, and below that the quotient is rounded by at most 2^-21 * q < q / (2 * number). */
static int sum_float8_exactly(const struct job *job, size_t first, size_t n, float *restrict sum)
{
    const struct float8 *const type = &float8[job->only];
    u8 largest = (n % 64 == 0 ? type->sum : sum_float8)(job, first, n, sum);
    return job->number < 1 << 20 && largest != 0xFF &&
           widened(largest, type->format) * (float)job->number < 0x1p24f * type->least; /* not if one is NaN or Inf */
}

/* Sums inputs of which none is float64. */
static void sum_narrower(const struct job *job, size_t first, size_t n, double *sum)
{
    float buffers[4][BLOCK];
    const void *values[4];
    for (int64_t k = 0, number; k < job->number; k += number) {
        number = k + 4 <= job->number ? 4 : 1;
        for (int i = 0; i < number; i++)
            values[i] = values_of(&job->inputs[k + i], first, n, buffers[i]);
        if (number == 4)
            add_four(sum, values, k == 0, n);
        else
            add(sum, values[0], k == 0, n);
    }
}

/* Widens one input to float64. */
static void load(const struct input *input, size_t first, size_t n, double *wide)
{
    float buffer[BLOCK];
    if (input->dtype == F64)
        memcpy(wide, stored(input, first), n * sizeof *wide);
    else
        add(wide, values_of(input, first, n, buffer), 1, n);
}

/* The sums of inputs times their weights, of any dtypes. With u = 2^-53, the error of a sum of n products is at most
 * n u / (1 - n u) * sum(|weight * input|), unless a product is subnormal (Higham, Accuracy and Stability of Numerical
 * Algorithms, section 3.1). */
static void sum_weighted(const struct job *job, size_t first, size_t n, double *sum)
{
    double input[BLOCK];
    for (int64_t k = 0; k < job->number; k++) {
        load(&job->inputs[k], first, n, input);
        add_product(sum, input, job->weights[k], k == 0, n);
    }
}

/* Where a weighted sum is not finite, but all inputs are equal, the mean is that value: -Inf in a mask, times weights of
 * both signs, would be NaN. */
static double equal_or(const struct job *job, size_t element, double mean)
{
    double start, other;
    load(&job->inputs[0], element, 1, &start);
    for (int64_t k = 1; k < job->number; k++) {
        load(&job->inputs[k], element, 1, &other);
        if (bits_of(other) != bits_of(start))
            return mean;
    }
    return start;
}

/* The exact mean of one element. */
static double exact_mean(const struct job *job, size_t element, int to_odd)
{
    struct integer positive = {{0}}, negative = {{0}};
    double sum = -0.0;
    int is_finite = 1;
    for (int64_t k = 0; k < job->number; k++) {
        double value;
        load(&job->inputs[k], element, 1, &value);
        sum += value;
        is_finite &= (bits_of(value) & MAGNITUDE) < INFINITE;
        if (is_finite)
            add_magnitude(bits_of(value) < 0 ? &negative : &positive, value);
    }
    if (!is_finite)
        return sum / (double)job->number;
    int is_negative = is_smaller(&positive, &negative);
    struct integer *larger = is_negative ? &negative : &positive;
    subtract(larger, is_negative ? &positive : &negative);
    double mean = quotient_of(larger, (uint32_t)job->number, to_odd);
    return is_negative ? -mean : mean;
}

/* The means of float64 inputs; elements that are equal in all are copied. */
static void mean_of_float64(const struct job *job, size_t first, size_t n, double *mean)
{
    double start[EXACT_BLOCK], input[EXACT_BLOCK], low[EXACT_BLOCK], lost[EXACT_BLOCK];
    int64_t different[EXACT_BLOCK], unsure[EXACT_BLOCK];
    int to_odd = job->dtype != F64;
    load(&job->inputs[0], first, n, start);
    memcpy(mean, start, n * sizeof *mean);
    memset(low, 0, n * sizeof *low);
    memset(lost, 0, n * sizeof *lost);
    memset(different, 0, n * sizeof *different);
    for (int64_t k = 1; k < job->number; k++) {
        load(&job->inputs[k], first, n, input);
        add_exactly(mean, low, lost, different, start, input, n);
    }
    divide_exactly(mean, low, lost, unsure, (double)job->number, to_odd, n);
    for (size_t i = 0; i < n; i++) {
        if (different[i] == 0)
            mean[i] = start[i];
        else if (unsure[i])
            mean[i] = exact_mean(job, first + i, to_odd);
    }
}

/* Computes n <= BLOCK means and writes them at `output`. Returns whether any is NaN or infinite there; `mean` then
 * contains them. */
static int write_means(const struct job *job, size_t first, size_t n, double *mean, char *output)
{
    double number = (double)job->number, factor = 1;
    if (job->weights != NULL) {
        sum_weighted(job, first, n, mean);
    } else if (job->has_float64) {
        for (size_t i = 0; i < n; i += EXACT_BLOCK)
            mean_of_float64(job, first + i, n - i < EXACT_BLOCK ? n - i : EXACT_BLOCK, mean + i);
    } else {
        float sums[BLOCK];
        int is_exact = job->only >= E5M2 && sum_float8_exactly(job, first, n, sums);
        if (is_exact && job->dtype == job->only) {
            float8[job->only].round(sums, (float)number, (u8 *)output, n);
            return 0; /* no mean is larger than all inputs */
        }
        if (is_exact)
            add(mean, sums, 1, n);
        else
            sum_narrower(job, first, n, mean);
        /* To multiply by the reciprocal of a power of two rounds the same number, in a fraction of the time. */
        if ((bits_of(number) & FRACTION) == 0)
            factor = 1 / number;
        else
            divide(mean, number, n);
    }
    if (!round_to[job->dtype](mean, factor, output, n))
        return 0;
    for (size_t i = 0; i < n; i++)
        mean[i] *= factor;
    return 1;
}

/* Looks through means of which some are NaN or infinite in the output: writes the code of NaN; ends the call with the
 * first mean that is not finite, or else out of range. */
static void look_through(struct job *job, double *mean, size_t first, size_t n, int64_t begin, char *output)
{
    int64_t size = sizes[job->dtype], not_finite = -1, out_of_range = -1, found = -1;
    for (size_t i = n; i-- > 0;) {
        if ((bits_of(mean[i]) & MAGNITUDE) >= INFINITE && job->weights != NULL)
            mean[i] = equal_or(job, first + i, mean[i]);
        int is_out = round_to[job->dtype](&mean[i], 1, output + (int64_t)i * size, 1);
        if ((bits_of(mean[i]) & MAGNITUDE) >= INFINITE)
            not_finite = (int64_t)i;
        else if (is_out)
            out_of_range = (int64_t)i;
    }
    if (not_finite >= 0)
        write_nans(mean, output, n, job->dtype);
    if (not_finite >= 0 && (job->check & CHECK_FINITE))
        job->what = NOT_FINITE, found = not_finite;
    else if (out_of_range >= 0 && (job->check & CHECK_RANGE))
        job->what = OUT_OF_RANGE, found = out_of_range;
    if (found >= 0)
        job->index = begin + (int64_t)first + found, job->value = mean[found];
}

/* Computes the elements of the open windows, which are [begin, begin + n) of the call. */
static void mean_of_windows(struct job *job, int64_t begin, int64_t n)
{
    double mean[BLOCK];
    for (size_t first = 0, count; first < (size_t)n && job->what == DONE; first += count) {
        count = (size_t)n - first < BLOCK ? (size_t)n - first : BLOCK;
        char *output = job->output + (begin + (int64_t)first) * sizes[job->dtype];
        int is_bfloat16 = job->only == BF16 && job->dtype == BF16 && job->weights == NULL && write_bfloat16 != NULL;
        if (is_bfloat16 && count > 32)
            count -= count % 32;
        if (is_bfloat16 && count % 32 == 0 && write_bfloat16(job, first, count, (u16 *)output))
            continue;
        if (write_means(job, first, count, mean, output))
            look_through(job, mean, first, count, begin, output);
    }
}

/* The bytes of a window: of a slot, unless inputs are read, whose windows together stay in the caches of a core. */
static int64_t window_size(const struct job *job)
{
    int64_t most = READ_TOGETHER / job->number > READ_LEAST ? READ_TOGETHER / job->number : READ_LEAST;
    return job->has_maps || job->slot < most ? job->slot : most;
}

static void compute(struct job *job)
{
    fenv_t kept; /* threads inherit it: a program may flush subnormal numbers to zero, as torch.set_flush_denormal does */
    fegetenv(&kept);
    fesetenv(FE_DFL_ENV);
    int64_t window = job->elements, size = 1;
    job->only = job->inputs[0].dtype;
    for (int64_t i = 0; i < job->number; i++) {
        int64_t dtype = job->inputs[i].dtype;
        size = sizes[dtype] > size ? sizes[dtype] : size;
        job->has_float64 |= dtype == F64;
        job->only = dtype == job->only ? dtype : -1;
    }
    int64_t most = window_size(job) / size;
    most -= most > BLOCK ? most % BLOCK : 0; /* for whole blocks */
    window = window < most ? window : most;
    current = job;
    for (int64_t first = 0; first < job->elements && job->what == DONE; first += window) {
        int64_t n = job->elements - first < window ? job->elements - first : window;
        if (open_windows(job, first, n) == 0)
            mean_of_windows(job, first, n);
        close_windows(job);
        if (job->lost)
            fail(job, LOST, job->lost - 1, 0);
    }
    current = NULL;
    fesetenv(&kept);
}

/* ---- strided tensors --------------------------------------------------------------------------------------------- */

#define MOST_DIMENSIONS 64 /* of extents above one, more than 2**64 elements need */
#define TILE 32            /* both sides of a tile stay in the cache: one is read, the other written, across its rows */

struct box {
    int dimensions;
    int64_t extent[MOST_DIMENSIONS], from[MOST_DIMENSIONS], to[MOST_DIMENSIONS]; /* steps in elements */
};

#define DEFINE_COPY(BITS)                                                                                              \
    static void copy_##BITS(const struct box *box, const char *source, char *target)                                   \
    {                                                                                                                  \
        int row = box->dimensions - 2, column = box->dimensions - 1;                                                   \
        int64_t rows = box->extent[row], columns = box->extent[column];                                                \
        for (int64_t r = 0; r < rows; r += TILE)                                                                       \
            for (int64_t c = 0; c < columns; c += TILE)                                                                \
                for (int64_t i = r; i < rows && i < r + TILE; i++)                                                     \
                    for (int64_t j = c; j < columns && j < c + TILE; j++)                                              \
                        ((u##BITS *)target)[i * box->to[row] + j * box->to[column]] =                                  \
                            ((const u##BITS *)source)[i * box->from[row] + j * box->from[column]];                     \
    }
DEFINE_COPY(8)
DEFINE_COPY(16)
DEFINE_COPY(32)
DEFINE_COPY(64)

static void copy_box(const struct box *box, int dimension, const char *source, char *target, int64_t size)
{
    if (dimension < box->dimensions - 2) {
        for (int64_t i = 0; i < box->extent[dimension]; i++)
            copy_box(box, dimension + 1, source + i * box->from[dimension] * size,
                     target + i * box->to[dimension] * size, size);
        return;
    }
    (size == 1 ? copy_8 : size == 2 ? copy_16 : size == 4 ? copy_32 : copy_64)(box, source, target);
}

/* ---- what Python sees -------------------------------------------------------------------------------------------- */

static int refuse(const char *what)
{
    PyErr_SetString(PyExc_ValueError, what);
    return -1;
}

/* Whether [position, position + count * size) is inside a buffer, in exact arithmetic. */
static int is_inside(int64_t position, int64_t count, int64_t size, int64_t length)
{
    return position >= 0 && count >= 0 && position <= length && count <= (length - position) / size;
}

static int check_mean(struct job *job, const Py_buffer *table, const Py_buffer *weights, const Py_buffer *memory,
                      const Py_buffer *output)
{
    if (job->number < 1 || job->number > 1 << 26 || table->len % (int64_t)sizeof(struct input) || (uintptr_t)table->buf % 8)
        return refuse("the table has no inputs, too many, or parts of them");
    if (weights->len && weights->len != job->number * (int64_t)sizeof(double))
        return refuse("not one weight for each input");
    if (job->dtype < 0 || job->dtype >= DTYPES)
        return refuse("no such output dtype");
    if (!is_inside(0, job->elements, sizes[job->dtype], output->len))
        return refuse("the output is too small");
    if (job->slot < 8)
        return refuse("a slot is too small");
    for (int64_t i = 0; i < job->number; i++) {
        struct input *input = &job->inputs[i];
        input->address = input->mapping = input->nmapping = 0;
        if (input->dtype < 0 || input->dtype >= DTYPES)
            return refuse("no such input dtype");
        job->has_maps |= input->where == MAP;
        if (input->where < MEMORY || input->where > READ || !is_inside(input->offset, job->elements, 8, INT64_MAX))
            return refuse("no such place");
        if (input->where != MAP && !is_inside(input->position, job->slot, 1, memory->len))
            return refuse("the memory is too small");
        if (input->where == MEMORY && !is_inside(0, job->elements, sizes[input->dtype], job->slot))
            return refuse("an input is larger than its slot");
    }
    return 0;
}

PyDoc_STRVAR(mean_text, "mean(table, weights, memory, slot, elements, dtype, output, check) -> (what, index, code, "
                        "value)\n\nSee native.py. Without weights, all inputs count the same.");

static PyObject *py_mean(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer table, weights, memory, output;
    Py_ssize_t slot, elements;
    struct job job = {0};
    if (!PyArg_ParseTuple(arguments, "w*y*w*nniw*i", &table, &weights, &memory, &slot, &elements, &job.dtype, &output,
                          &job.check))
        return NULL;
    job.inputs = table.buf;
    job.weights = weights.len ? weights.buf : NULL;
    job.number = table.len / (Py_ssize_t)sizeof(struct input);
    job.memory = memory.buf, job.output = output.buf;
    job.slot = slot, job.elements = elements;
    PyObject *result = NULL;
    if (check_mean(&job, &table, &weights, &memory, &output) == 0) {
        if (job.has_maps && watch_faults() != 0) {
            PyErr_SetFromErrno(PyExc_OSError);
        } else {
            Py_BEGIN_ALLOW_THREADS
            compute(&job);
            Py_END_ALLOW_THREADS
            result = Py_BuildValue("iLLd", job.what, (long long)job.index, (long long)job.code, job.value);
        }
    }
    PyBuffer_Release(&table);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&memory);
    PyBuffer_Release(&output);
    return result;
}

/* Reads the box from tuples; finds the first and the last element of both sides. */
static int read_box(struct box *box, PyObject *extents, PyObject *from, PyObject *to, int64_t last[2])
{
    Py_ssize_t dimensions = PyTuple_Size(extents);
    if (dimensions < 0 || PyTuple_Size(from) != dimensions || PyTuple_Size(to) != dimensions)
        return PyErr_Occurred() ? -1 : refuse("extents and steps of different lengths");
    last[0] = last[1] = 0;
    box->dimensions = 0;
    for (Py_ssize_t i = 0; i < dimensions; i++) {
        int64_t values[3];
        PyObject *tuples[3] = {extents, from, to};
        for (int k = 0; k < 3; k++) {
            values[k] = PyLong_AsLongLong(PyTuple_GetItem(tuples[k], i));
            if (values[k] == -1 && PyErr_Occurred())
                return -1;
        }
        if (values[0] < 1 || values[1] < 0 || values[2] < 0)
            return refuse("an extent or a step is out of range");
        if (values[0] == 1)
            continue;
        if (box->dimensions == MOST_DIMENSIONS - 2)
            return refuse("too many dimensions");
        for (int k = 0; k < 2; k++) {
            int64_t step = values[1 + k], span;
            if (__builtin_mul_overflow(values[0] - 1, step, &span) || __builtin_add_overflow(last[k], span, &last[k]))
                return refuse("a box is too large");
        }
        box->extent[box->dimensions] = values[0];
        box->from[box->dimensions] = values[1];
        box->to[box->dimensions++] = values[2];
    }
    return 0;
}

/* Puts the dimension with the smallest step in the source before the last, so that tiles read along it; adds dimensions
 * of extent one until there are two. */
static void order_box(struct box *box)
{
    for (; box->dimensions < 2; box->dimensions++) {
        int last = box->dimensions;
        box->extent[last] = 1, box->from[last] = 0, box->to[last] = 0;
    }
    int row = box->dimensions - 2, fast = row;
    for (int i = 0; i < row; i++)
        fast = box->from[i] < box->from[fast] ? i : fast;
    int64_t *const of[3] = {box->extent, box->from, box->to};
    for (int k = 0; k < 3; k++) {
        int64_t kept = of[k][row];
        of[k][row] = of[k][fast];
        of[k][fast] = kept;
    }
}

PyDoc_STRVAR(copy_text, "copy(source, begin, target, start, extents, from_steps, to_steps, size)\n\n"
                        "Copies a box of elements of `size` bytes. Begins are in bytes, steps in elements, never "
                        "negative; extents are at least one.");

static PyObject *py_copy(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer source, target;
    Py_ssize_t begin, start;
    PyObject *extents, *from, *to;
    int size;
    if (!PyArg_ParseTuple(arguments, "y*nw*nOOOi", &source, &begin, &target, &start, &extents, &from, &to, &size))
        return NULL;
    struct box box;
    int64_t last[2];
    int failed = read_box(&box, extents, from, to, last);
    if (!failed && size != 1 && size != 2 && size != 4 && size != 8)
        failed = refuse("elements have 1, 2, 4 or 8 bytes");
    if (!failed && (last[0] == INT64_MAX || !is_inside(begin, last[0] + 1, size, source.len)))
        failed = refuse("the box is not inside the source");
    if (!failed && (last[1] == INT64_MAX || !is_inside(start, last[1] + 1, size, target.len)))
        failed = refuse("the box is not inside the target");
    if (!failed) {
        order_box(&box);
        Py_BEGIN_ALLOW_THREADS
        copy_box(&box, 0, (const char *)source.buf + begin, (char *)target.buf + start, size);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(nonfinite_text, "nonfinite(values, dtype, width, infinities) -> (count, first)\n\n"
                             "Counts the elements, of `width` values each, with NaN, or with NaN or Inf; first is "
                             "the index of the first of them, -1 if there is none.");

static PyObject *py_nonfinite(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer values;
    int dtype, width, infinities;
    if (!PyArg_ParseTuple(arguments, "y*iip", &values, &dtype, &width, &infinities))
        return NULL;
    if (dtype < 0 || dtype >= DTYPES || width < 1) {
        PyBuffer_Release(&values);
        refuse("no such dtype or width");
        return NULL;
    }
    int64_t found = 0, last = -1, first = -1, number = values.len / sizes[dtype];
    struct input input = {.address = (intptr_t)values.buf, .dtype = dtype};
    Py_BEGIN_ALLOW_THREADS
    for (int64_t begin = 0; begin < number; begin += BLOCK) {
        double wide[BLOCK];
        int64_t n = number - begin < BLOCK ? number - begin : BLOCK;
        load(&input, (size_t)begin, (size_t)n, wide);
        for (int64_t i = 0; i < n; i++) {
            int64_t element = (begin + i) / width;
            int64_t magnitude = bits_of(wide[i]) & MAGNITUDE;
            if (element != last && (magnitude > INFINITE || (infinities && magnitude == INFINITE))) {
                first = found == 0 ? element : first;
                last = element;
                found++;
            }
        }
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&values);
    return Py_BuildValue("LL", (long long)found, (long long)first);
}

PyDoc_STRVAR(advise_text, "advise(descriptor, offset, length)\n\nAsks the system to bring a range of a file into the "
                          "page cache. A hint: it neither waits nor fails.");

static PyObject *py_advise(PyObject *module, PyObject *arguments)
{
    (void)module;
    int descriptor;
    Py_ssize_t offset, length;
    if (!PyArg_ParseTuple(arguments, "inn", &descriptor, &offset, &length))
        return NULL;
    if (!is_inside(offset, length, 1, PY_SSIZE_T_MAX - ADVISED)) {
        refuse("no such range");
        return NULL;
    }
#ifdef POSIX_FADV_WILLNEED
    Py_BEGIN_ALLOW_THREADS
    int failed = 0;
    for (Py_ssize_t begin = offset - offset % ADVISED, end = offset + length; begin < end && !failed; begin += ADVISED)
        failed = posix_fadvise(descriptor, begin, end - begin < ADVISED ? end - begin : ADVISED, POSIX_FADV_WILLNEED);
    Py_END_ALLOW_THREADS
#endif
    Py_RETURN_NONE;
}

static int start(PyObject *module)
{
    choose_instructions();
    static const struct {
        const char *name;
        int value;
    } constants[] = {
        {"MEMORY", MEMORY},         {"MAP", MAP},         {"READ", READ},           {"DONE", DONE},
        {"NOT_FINITE", NOT_FINITE}, {"LOST", LOST},       {"OUT_OF_RANGE", OUT_OF_RANGE},
        {"NOT_MAPPED", NOT_MAPPED}, {"NOT_READ", NOT_READ}, {"CHECK_FINITE", CHECK_FINITE},
        {"CHECK_RANGE", CHECK_RANGE}, {"ROW", (int)sizeof(struct input)},
    };
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) != 0)
            return -1;
    PyObject *dtypes = PyDict_New();
    for (int i = 0; dtypes != NULL && i < DTYPES; i++) {
        PyObject *code = PyLong_FromLong(i);
        if (code == NULL || PyDict_SetItemString(dtypes, names[i], code) != 0)
            Py_CLEAR(dtypes);
        Py_XDECREF(code);
    }
    int failed = dtypes == NULL || PyModule_AddObjectRef(module, "DTYPES", dtypes) != 0;
    Py_XDECREF(dtypes);
    return failed ? -1 : 0;
}

static PyMethodDef methods[] = {
    {"mean", py_mean, METH_VARARGS, mean_text},
    {"copy", py_copy, METH_VARARGS, copy_text},
    {"nonfinite", py_nonfinite, METH_VARARGS, nonfinite_text},
    {"advise", py_advise, METH_VARARGS, advise_text},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)start},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_kernel", .m_doc = "The native engine.", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&definition); }
