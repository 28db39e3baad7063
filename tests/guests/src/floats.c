/* Floating point: SSE scalars and the x87, rounding, flags, extremes, known values. */
#include <fenv.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "check.h"

static volatile double one = 1.0, three = 3.0, zero = 0.0, tiny = DBL_MIN, huge = DBL_MAX;
static volatile long double lone = 1.0L, lthree = 3.0L;

static uint64_t bits(double value)
{
	uint64_t out;

	memcpy(&out, &value, sizeof out);
	return out;
}

static uint64_t mantissa(long double value)
{
	uint64_t out;

	memcpy(&out, &value, sizeof out);
	return out;
}

static void rounding(void)
{
	static const int modes[] = { FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO };
	static const char *const names[] = { "to nearest", "down", "up", "to zero" };
	static const uint64_t sse[] = { 0x3fd5555555555555, 0x3fd5555555555555,
					0x3fd5555555555556, 0x3fd5555555555555 };
	static const uint64_t x87[] = { 0xaaaaaaaaaaaaaaab, 0xaaaaaaaaaaaaaaaa,
					0xaaaaaaaaaaaaaaab, 0xaaaaaaaaaaaaaaaa };
	static const long nearest[] = { 2, 2, 3, 2 };
	volatile double half = 2.5;

	for (int i = 0; i < 4; i++) {
		fesetround(modes[i]);
		printf("rounding %s:\n", names[i]);
		check_u64("1/3 in SSE", bits(one / three), sse[i]);
		check_u64("1/3 in the x87", mantissa(lone / lthree), x87[i]);
		check_u64("2.5 to an integer", (uint64_t)lrint(half), (uint64_t)nearest[i]);
	}
	fesetround(FE_TONEAREST);
}

static void flags(void)
{
	volatile double result;
	volatile long double lresult;

	feclearexcept(FE_ALL_EXCEPT);
	result = one / zero;
	check("division by zero gives infinity", isinf(result) && fetestexcept(FE_DIVBYZERO));
	feclearexcept(FE_ALL_EXCEPT);
	result = zero / zero;
	check("0/0 is invalid", isnan(result) && fetestexcept(FE_INVALID));
	feclearexcept(FE_ALL_EXCEPT);
	result = huge * 2;
	check("overflow", isinf(result) && fetestexcept(FE_OVERFLOW));
	feclearexcept(FE_ALL_EXCEPT);
	result = tiny / 3;
	check_u64("a denormal", bits(result), 0x0005555555555555);
	check("underflow", fetestexcept(FE_UNDERFLOW));
	feclearexcept(FE_ALL_EXCEPT);
	result = one + one;
	check("an exact sum sets no flag", fetestexcept(FE_ALL_EXCEPT) == 0);
	lresult = lone / lthree;
	check("the x87's inexact flag", lresult > 0 && fetestexcept(FE_INEXACT));
}

static void known(void)
{
	volatile double two = 2.0, tenth = 0.1;
	volatile long double ltwo = 2.0L, angle = 0.5L;
	long double loaded;

	check_u64("sqrt(2)", bits(sqrt(two)), 0x3ff6a09e667f3bcd);
	check_u64("sqrt(2) in the x87", mantissa(sqrtl(ltwo)), 0xb504f333f9de6484);
	check_u64("0.1 + 0.2", bits(tenth + 2 * tenth), 0x3fd3333333333334);
	check_u64("fma(0.1, 10, -1)", bits(fma(tenth, 10.0, -1.0)), 0x3c90000000000000);
	__asm__("fldpi" : "=t"(loaded));
	check_u64("fldpi", mantissa(loaded), 0xc90fdaa22168c235);
	__asm__("fldl2e" : "=t"(loaded));
	check_u64("fldl2e", mantissa(loaded), 0xb8aa3b295c17f0bc);
	__asm__("fsin" : "=t"(loaded) : "0"(angle));
	check("fsin(0.5)", fabsl(loaded - 0.479425538604203000273L) < 1e-18L);
	__asm__("fcos" : "=t"(loaded) : "0"(angle));
	check("fcos(0.5)", fabsl(loaded - 0.877582561890372716116L) < 1e-18L);
	__asm__("f2xm1" : "=t"(loaded) : "0"(angle));
	check("f2xm1(0.5)", fabsl(loaded - 0.414213562373095048802L) < 1e-18L);
	check("exp, log, pow", fabs(exp(one) - M_E) < 1e-15 && fabs(log(two) - M_LN2) < 1e-15 &&
				       pow(two, 10.0) == 1024.0);
	check("fmod", fmod(1e17, 7.0) == 5.0);
}

static void conversions(void)
{
	volatile double big = 9007199254740993e3, negative = -2.75;
	char text[64];

	check_u64("to a 64-bit integer", (uint64_t)(int64_t)big, 9007199254740993024u);
	check_u64("a negative, cut", (uint64_t)(int64_t)negative, (uint64_t)-2);
	check_u64("an unsigned 64-bit integer",
		  bits((double)(volatile uint64_t){ 0xfffffffffffff800 }),
		  0x43efffffffffffff);
	snprintf(text, sizeof text, "%.17g %La", 0.1, 1.5L);
	check("printed", strcmp(text, "0.10000000000000001 0xcp-3") == 0);
	check("read", strtod("2.2250738585072011e-308", NULL) == 0x1.ffffffffffffep-1023);
}

static void packed_decimal(void)
{
	uint8_t bcd[10];
	volatile long double value = -1234567890123456.0L;
	static const uint8_t wanted[10] = { 0x56, 0x34, 0x12, 0x90, 0x78,
					    0x56, 0x34, 0x12, 0x00, 0x80 };

	__asm__ volatile("fbstp %0" : "=m"(bcd) : "t"(value) : "st");
	check_bytes("fbstp", bcd, wanted, sizeof bcd);
}

int main(void)
{
	rounding();
	flags();
	known();
	conversions();
	packed_decimal();
	return finish("floats");
}
