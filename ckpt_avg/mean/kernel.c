/* The native engine: the mean of one block of elements in one call, without the interpreter lock.
 *
 * For each element it widens the inputs to float64, adds them in checkpoint order, divides once by their number, and
 * rounds once to the output's dtype. The torch engine (arithmetic.py) gives the same bytes. This file is compiled
 * without contraction to FMA and without fast-math: a compiler that keeps the order of IEEE 754 operations cannot change
 * a bit of the result, and the vector instructions that `target_clones` selects at run time cannot either.
 *
 * Nothing is allocated: the caller passes a table with a row for each input, and memory for the inputs that are not
 * mapped. What Python passes is checked before the lock is released.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <float.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

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

/* Rounds a float64 to the code of a narrower format: once, to nearest, ties to even. NaN is not handled here.
 *
 * Where the result is normal, the float64's bits are an integer whose upper part is the code but for the bias, and whose
 * lower part is what is cut off. Adding one less than half of the cut part's range, and one more if the code is odd,
 * carries into the code exactly if the cut part is above half, or at half and the code odd; a carry out of the mantissa
 * is the next exponent. Where the result is subnormal, |value| + C with C = 2^(52 + 1 - bias - mantissa) rounds at the
 * unit of the format's subnormal numbers, since that is the unit in the last place of C: one addition, one rounding. The
 * difference of the sum's bits and C's is the number of units, which is the code, up to the smallest normal one. */
INLINE int64_t rounded(double value, struct format format)
{
    int64_t bits = bits_of(value), magnitude = bits & MAGNITUDE;
    int shift = 52 - format.mantissa;
    int64_t code = magnitude + ((INT64_C(1) << (shift - 1)) - 1) + ((magnitude >> shift) & 1);
    code = (code >> shift) - ((int64_t)(1023 - format.bias) << format.mantissa);
    int64_t least = (int64_t)(1023 + 1 - format.bias) << 52;
    int64_t unit = (int64_t)(1023 + 52 + 1 - format.bias - format.mantissa) << 52;
    int64_t subnormal = bits_of(double_of(magnitude) + double_of(unit)) - unit;
    code = magnitude < least ? subnormal : code;
    code = code > format.infinity ? format.infinity : code;
    int64_t sign = (int64_t)((uint64_t)bits >> (64 - format.bits)) & (INT64_C(1) << (format.bits - 1));
    if (!HAS_NEGATIVE_ZERO(format))
        sign = code == 0 ? 0 : sign;
    return code | sign;
}

/* Inputs narrower than float32 are first widened to it, exactly. */
CLONES static void widen_BF16(const char *input, float *restrict values, size_t n)
{
    for (size_t i = 0; i < n; i++)
        values[i] = float_of((uint32_t)((const u16 *)input)[i] << 16);
}

/* In two steps, because compilers otherwise compute with many small integers where a few wide ones are faster. */
#define DEFINE_WIDEN(DTYPE, TYPE)                                                                                      \
    CLONES static void widen_##DTYPE(const char *input, float *restrict values, size_t n)                              \
    {                                                                                                                  \
        uint32_t codes[BLOCK];                                                                                         \
        for (size_t i = 0; i < n; i++)                                                                                 \
            codes[i] = ((const TYPE *)input)[i];                                                                       \
        for (size_t i = 0; i < n; i++)                                                                                 \
            values[i] = widened(codes[i], FORMAT_##DTYPE);                                                             \
    }
DEFINE_WIDEN(F16, u16)
DEFINE_WIDEN(E5M2, u8)
DEFINE_WIDEN(E4M3, u8)
DEFINE_WIDEN(E5M2_FNUZ, u8)
DEFINE_WIDEN(E4M3_FNUZ, u8)

typedef void (*widen_function)(const char *, float *restrict, size_t);
static const widen_function widen[DTYPES] = {
    NULL, NULL, widen_BF16, widen_F16, widen_E5M2, widen_E4M3, widen_E5M2_FNUZ, widen_E4M3_FNUZ,
};

/* ---- sums -------------------------------------------------------------------------------------------------------- */

/* Adds one input to the sums, or four in their order: then the sums are loaded and stored once for four inputs. */
#define DEFINE_SUMS(TYPE)                                                                                              \
    CLONES static void add_##TYPE(double *restrict sum, const void *a, size_t n)                                       \
    {                                                                                                                  \
        for (size_t i = 0; i < n; i++)                                                                                 \
            sum[i] += ((const TYPE *)a)[i];                                                                            \
    }                                                                                                                  \
    CLONES static __attribute__((unused)) void add_four_##TYPE(double *restrict sum, const void *const *inputs, size_t n)                      \
    {                                                                                                                  \
        const TYPE *a = inputs[0], *b = inputs[1], *c = inputs[2], *d = inputs[3];                                     \
        for (size_t i = 0; i < n; i++)                                                                                 \
            sum[i] = (((sum[i] + a[i]) + b[i]) + c[i]) + d[i];                                                         \
    }
DEFINE_SUMS(f32)
DEFINE_SUMS(f64)

/* Divides the sums by the number of inputs. Returns whether any mean is NaN or infinite: finite inputs narrower than
 * float64 cannot overflow the sum, so an input was. Multiplying by the reciprocal of a power of two, which is exact,
 * rounds the same number, and takes a fraction of the time. */
CLONES static int divide(double *restrict sum, double number, size_t n)
{
    int64_t found = 0;
    double reciprocal = 1 / number;
    if ((bits_of(number) & FRACTION) == 0)
        for (size_t i = 0; i < n; i++)
            sum[i] *= reciprocal;
    else
        for (size_t i = 0; i < n; i++)
            sum[i] /= number;
    for (size_t i = 0; i < n; i++)
        found |= (bits_of(sum[i]) & MAGNITUDE) >= INFINITE;
    return found != 0;
}

/* ---- rounding ---------------------------------------------------------------------------------------------------- */

/* Writes means in the output's dtype. Returns whether any is NaN or infinite there. */
#define DEFINE_ROUND(DTYPE, TYPE)                                                                                      \
    CLONES static int round_##DTYPE(const double *restrict mean, char *restrict output, size_t n)                      \
    {                                                                                                                  \
        TYPE *codes = (TYPE *)output, found = 0;                                                                       \
        for (size_t i = 0; i < n; i++)                                                                                 \
            codes[i] = (TYPE)rounded(mean[i], FORMAT_##DTYPE);                                                         \
        for (size_t i = 0; i < n; i++)                                                                                 \
            found |= (TYPE)is_infinite(codes[i], FORMAT_##DTYPE);                                                      \
        return found != 0;                                                                                             \
    }
DEFINE_ROUND(BF16, u16)
DEFINE_ROUND(F16, u16)
DEFINE_ROUND(E5M2, u8)
DEFINE_ROUND(E4M3, u8)
DEFINE_ROUND(E5M2_FNUZ, u8)
DEFINE_ROUND(E4M3_FNUZ, u8)

CLONES static int round_F32(const double *restrict mean, char *restrict output, size_t n)
{
    u32 found = 0;
    for (size_t i = 0; i < n; i++)
        ((f32 *)output)[i] = (float)mean[i];
    for (size_t i = 0; i < n; i++)
        found |= (((u32 *)output)[i] & 0x7FFFFFFFu) >= 0x7F800000u;
    return found != 0;
}

static int round_F64(const double *restrict mean, char *restrict output, size_t n)
{
    memcpy(output, mean, n * sizeof *mean);
    return 0;
}

typedef int (*round_function)(const double *restrict, char *restrict, size_t);
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

/* ---- float64 inputs ---------------------------------------------------------------------------------------------- */

/* Adds an input to sums of float64 values, which round: what each addition loses is summed separately (TwoSum: Knuth,
 * The Art of Computer Programming, vol. 2, section 4.2.2, theorem B). `different` collects the bits in which an input
 * differs from the first. */
CLONES static void add_exactly(double *restrict sum, double *restrict lost, int64_t *restrict different,
                               const double *restrict first, const double *restrict input, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double after = sum[i] + input[i], kept = after - sum[i];
        lost[i] += (sum[i] - (after - kept)) + (input[i] - kept);
        sum[i] = after;
        different[i] |= bits_of(input[i]) ^ bits_of(first[i]);
    }
}

/* ---- the inputs of one call -------------------------------------------------------------------------------------- */

enum { MEMORY, MAP, READ }; /* where an input is: in its slot of the caller's memory, or in a file to map, or to read */

/* A row of the caller's table. */
struct input {
    int64_t where, descriptor, offset, dtype;
    int64_t address;           /* of the window's first element; set here, like what follows */
    int64_t mapping, nmapping; /* the mapped pages of the window; none if nmapping is 0 */
};

enum { DONE, NOT_FINITE, OUT_OF_RANGE, NOT_MAPPED, NOT_READ, LOST };

struct job {
    struct input *inputs;
    int64_t number, elements, slot;
    char *memory, *output;
    int dtype, check;
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
    char *slot = job->memory + i * job->slot;
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
            input->address = (intptr_t)(job->memory + i * job->slot + first * size);
        else if ((input->where == MAP ? map_window : read_window)(job, i, input->offset + first * size, n * size) != 0)
            return -1;
    }
    return 0;
}

/* ---- the mean of one window -------------------------------------------------------------------------------------- */

/* Where the values of one input are, as float32 or, if they are stored so, float64: in place, or in `buffer`. */
static const void *values_of(const struct input *input, size_t first, size_t n, float *buffer)
{
    const char *stored = (const char *)(intptr_t)input->address + first * (size_t)sizes[input->dtype];
    if (widen[input->dtype] == NULL)
        return stored;
    widen[input->dtype](stored, buffer, n);
    return buffer;
}

/* Sums inputs of which none is float64. */
static void sum_narrower(const struct job *job, size_t first, size_t n, double *sum)
{
    float buffers[4][BLOCK];
    const void *values[4];
    int64_t k = 0;
    for (size_t i = 0; i < n; i++)
        sum[i] = -0.0; /* the neutral element: -0.0 + -0.0 is -0.0 */
    for (; k + 4 <= job->number; k += 4) {
        for (int i = 0; i < 4; i++)
            values[i] = values_of(&job->inputs[k + i], first, n, buffers[i]);
        add_four_f32(sum, values, n);
    }
    for (; k < job->number; k++)
        add_f32(sum, values_of(&job->inputs[k], first, n, buffers[0]), n);
}

/* Widens one input to float64. */
static void load(const struct input *input, size_t first, size_t n, double *wide)
{
    float buffer[BLOCK];
    const void *values = values_of(input, first, n, buffer);
    for (size_t i = 0; i < n; i++)
        wide[i] = -0.0;
    (input->dtype == F64 ? add_f64 : add_f32)(wide, values, n);
}

/* The means of float64 inputs: compensated, equal elements copied, and sums that overflow computed again from inputs
 * scaled by a power of two. Returns whether any mean is NaN or infinite. */
static int mean_of_float64(const struct job *job, size_t first, size_t n, double *mean)
{
    double start[BLOCK], input[BLOCK], lost[BLOCK];
    int64_t different[BLOCK];
    double number = (double)job->number, scale = 1;
    while (scale * number > 1)
        scale /= 2;
    load(&job->inputs[0], first, n, start);
    memcpy(mean, start, n * sizeof *mean);
    memset(lost, 0, n * sizeof *lost);
    memset(different, 0, n * sizeof *different);
    for (int64_t k = 1; k < job->number; k++) {
        load(&job->inputs[k], first, n, input);
        add_exactly(mean, lost, different, start, input, n);
    }
    int found = 0;
    for (size_t i = 0; i < n; i++) {
        mean[i] += lost[i];
        if (different[i] == 0) {
            mean[i] = start[i];
        } else if ((bits_of(mean[i]) & MAGNITUDE) >= INFINITE) {
            double sum = -0.0;
            for (int64_t k = 0; k < job->number; k++) {
                double value;
                load(&job->inputs[k], first + i, 1, &value);
                sum += value * scale;
            }
            mean[i] = sum / number / scale;
        } else {
            mean[i] /= number;
        }
        found |= (bits_of(mean[i]) & MAGNITUDE) >= INFINITE;
    }
    return found;
}

/* Ends the call with the first mean that is NaN or infinite, in float64 or once it is rounded. */
static void locate(struct job *job, int what, const double *mean, int64_t begin, size_t n)
{
    char code[8];
    for (size_t i = 0; i < n && job->what == DONE; i++) {
        job->value = mean[i];
        if ((bits_of(mean[i]) & MAGNITUDE) >= INFINITE || round_to[job->dtype](&mean[i], code, 1))
            fail(job, what, begin + (int64_t)i, 0);
    }
}

/* Computes the elements of the open windows, which are [begin, begin + n) of the call. */
static void mean_of_windows(struct job *job, int64_t begin, int64_t n)
{
    double mean[BLOCK];
    int compensated = 0;
    for (int64_t i = 0; i < job->number; i++)
        compensated |= job->inputs[i].dtype == F64;
    for (int64_t first = 0; first < n && job->what == DONE; first += BLOCK) {
        size_t count = (size_t)(n - first < BLOCK ? n - first : BLOCK);
        int found;
        if (compensated) {
            found = mean_of_float64(job, (size_t)first, count, mean);
        } else {
            sum_narrower(job, (size_t)first, count, mean);
            found = divide(mean, (double)job->number, count);
        }
        char *output = job->output + (begin + first) * sizes[job->dtype];
        int is_out = round_to[job->dtype](mean, output, count);
        if (found && job->check)
            locate(job, NOT_FINITE, mean, begin + first, count);
        else if (found)
            write_nans(mean, output, count, job->dtype);
        else if (is_out && job->check)
            locate(job, OUT_OF_RANGE, mean, begin + first, count);
    }
}

static void compute(struct job *job)
{
    int64_t window = job->elements, size = 1;
    for (int64_t i = 0; i < job->number; i++)
        size = sizes[job->inputs[i].dtype] > size ? sizes[job->inputs[i].dtype] : size;
    if (window > job->slot / size)
        window = job->slot / size;
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

static int check_mean(const struct job *job, const Py_buffer *table, const Py_buffer *memory, const Py_buffer *output)
{
    if (job->number < 1 || table->len % (int64_t)sizeof(struct input) || (uintptr_t)table->buf % 8)
        return refuse("the table has no inputs, or parts of them");
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
        if (input->where < MEMORY || input->where > READ || !is_inside(input->offset, job->elements, 8, INT64_MAX))
            return refuse("no such place");
        if (input->where != MAP && job->number > memory->len / job->slot)
            return refuse("the memory is too small");
        if (input->where == MEMORY && !is_inside(0, job->elements, sizes[input->dtype], job->slot))
            return refuse("an input is larger than its slot");
    }
    return 0;
}

PyDoc_STRVAR(mean_text, "mean(table, memory, slot, elements, dtype, output, check) -> (what, index, code, value)\n\n"
                        "See native.py.");

static PyObject *py_mean(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer table, memory, output;
    Py_ssize_t slot, elements;
    struct job job = {0};
    if (!PyArg_ParseTuple(arguments, "w*w*nniw*p", &table, &memory, &slot, &elements, &job.dtype, &output, &job.check))
        return NULL;
    job.inputs = table.buf;
    job.number = table.len / (Py_ssize_t)sizeof(struct input);
    job.memory = memory.buf, job.output = output.buf;
    job.slot = slot, job.elements = elements;
    PyObject *result = NULL;
    if (check_mean(&job, &table, &memory, &output) == 0) {
        if (watch_faults() != 0) {
            PyErr_SetFromErrno(PyExc_OSError);
        } else {
            Py_BEGIN_ALLOW_THREADS
            compute(&job);
            Py_END_ALLOW_THREADS
            result = Py_BuildValue("iLLd", job.what, (long long)job.index, (long long)job.code, job.value);
        }
    }
    PyBuffer_Release(&table);
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

PyDoc_STRVAR(nonfinite_text, "nonfinite(values, dtype) -> (count, first)\n\n"
                             "Counts NaN and Inf; first is the index of the first of them, -1 if there is none.");

static PyObject *py_nonfinite(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer values;
    int dtype;
    if (!PyArg_ParseTuple(arguments, "y*i", &values, &dtype))
        return NULL;
    if (dtype < 0 || dtype >= DTYPES) {
        PyBuffer_Release(&values);
        refuse("no such dtype");
        return NULL;
    }
    int64_t found = 0, first = -1, number = values.len / sizes[dtype];
    struct input input = {.address = (intptr_t)values.buf, .dtype = dtype};
    Py_BEGIN_ALLOW_THREADS
    for (int64_t begin = 0; begin < number; begin += BLOCK) {
        double wide[BLOCK];
        int64_t n = number - begin < BLOCK ? number - begin : BLOCK;
        load(&input, (size_t)begin, (size_t)n, wide);
        for (int64_t i = 0; i < n; i++) {
            if ((bits_of(wide[i]) & MAGNITUDE) >= INFINITE) {
                first = first < 0 ? begin + i : first;
                found++;
            }
        }
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&values);
    return Py_BuildValue("LL", (long long)found, (long long)first);
}

static int add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        int value;
    } constants[] = {
        {"MEMORY", MEMORY},         {"MAP", MAP},         {"READ", READ},           {"DONE", DONE},
        {"NOT_FINITE", NOT_FINITE}, {"LOST", LOST},       {"OUT_OF_RANGE", OUT_OF_RANGE},
        {"NOT_MAPPED", NOT_MAPPED}, {"NOT_READ", NOT_READ}, {"ROW", (int)sizeof(struct input)},
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
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)add_constants},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_kernel", .m_doc = "The native engine.", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&definition); }
