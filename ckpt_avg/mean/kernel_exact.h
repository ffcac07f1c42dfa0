/* The arithmetic of float64 inputs. Part of kernel.c.
 *
 * A float64 sum of float64 inputs rounds at every step, and can overflow. Here the mean is exact and rounded once. The
 * sum is kept in two numbers, high + low, and so is the quotient; what these lose is bounded. Where the bound leaves two
 * numbers to round to, the mean is computed with integers (`exact_mean`). */

#define EXACT_BLOCK 256 /* for float64, which needs more buffers */

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
