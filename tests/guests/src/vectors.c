/* Vectors: what CPUID promises is used, against published test vectors and C. */
#include <cpuid.h>
#include <immintrin.h>

#include "check.h"

#define TARGET(features) __attribute__((target(features)))

static void sse2(void)
{
	__m128i a = _mm_setr_epi16(1, -2, 3, -4, 30000, -30000, 7, -8);
	__m128i b = _mm_setr_epi16(2, 3, -4, -5, 30000, 30000, 100, 200);
	static const int16_t sums[8] = { 3, 1, -1, -9, 32767, 0, 107, 192 };
	static const int32_t products[4] = { 1 * 2 + -2 * 3, 3 * -4 + -4 * -5, 0, 700 - 1600 };
	int16_t sum[8];
	int32_t product[4];

	_mm_storeu_si128((__m128i *)sum, _mm_adds_epi16(a, b));
	_mm_storeu_si128((__m128i *)product, _mm_madd_epi16(a, b));
	check_bytes("SSE2 saturating sum", sum, sums, sizeof sum);
	check_bytes("SSE2 multiply and add", product, products, sizeof product);
}

TARGET("ssse3,sse4.1") static void sse41(void)
{
	__m128i bytes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
	__m128i order = _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, -128);
	static const uint8_t reversed[16] = { 15, 14, 13, 12, 11, 10, 9, 8,
					      7,  6,  5,	 4,  3,	 2,  1, 0 };
	uint8_t out[16];

	_mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(bytes, order));
	check_bytes("SSSE3 shuffle", out, reversed, sizeof out);
	check_u64("SSE4.1 smallest word and its place",
		  (uint64_t)_mm_cvtsi128_si32(_mm_minpos_epu16(
			  _mm_setr_epi16(9, 8, 7, 3, 5, 6, 4, 10))),
		  3 << 16 | 3);
}

TARGET("sse4.2") static void sse42(void)
{
	uint32_t crc = 0xffffffff;

	for (const char *at = "123456789"; *at; at++)
		crc = _mm_crc32_u8(crc, (uint8_t)*at);
	check_u64("SSE4.2 CRC-32C", ~crc, 0xe3069283); /* RFC 3720, B.4's polynomial */
	check_u64("SSE4.2 string search",
		  (uint64_t)_mm_cmpistri(_mm_setr_epi8('d', 'e', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
						       0, 0, 0, 0),
					 _mm_setr_epi8('a', 'b', 'c', 'd', 'e', 'f', 0, 0, 0, 0,
						       0, 0, 0, 0, 0, 0),
					 _SIDD_CMP_EQUAL_ORDERED),
		  3);
}

TARGET("avx") static void avx(void)
{
	__m256d a = _mm256_setr_pd(1, 2, 3, 4), b = _mm256_setr_pd(10, 20, 30, 40);
	static const double wanted[4] = { 3, 30, 7, 70 };
	double out[4];

	_mm256_storeu_pd(out, _mm256_hadd_pd(a, b));
	check_bytes("AVX horizontal sum", out, wanted, sizeof out);
}

TARGET("avx2") static void avx2(void)
{
	static int32_t table[256];
	static const int32_t wanted[8] = { 0, 49, 196, 441, 784, 1225, 1764, 2401 };
	int32_t out[8];
	int64_t lanes[4];

	for (int i = 0; i < 256; i++)
		table[i] = i * i;
	_mm256_storeu_si256(
		(__m256i *)out,
		_mm256_i32gather_epi32(table, _mm256_setr_epi32(0, 7, 14, 21, 28, 35, 42, 49), 4));
	check_bytes("AVX2 gather", out, wanted, sizeof out);
	_mm256_storeu_si256((__m256i *)lanes,
			    _mm256_permute4x64_epi64(_mm256_setr_epi64x(0, 1, 2, 3), 0x1b));
	check("AVX2 permute", lanes[0] == 3 && lanes[1] == 2 && lanes[2] == 1 && lanes[3] == 0);
}

TARGET("fma") static void fma3(void)
{
	volatile double tenth = 0.1;
	__m128d r = _mm_fmsub_sd(_mm_set_sd(tenth), _mm_set_sd(10.0), _mm_set_sd(1.0));

	check("FMA rounds once", _mm_cvtsd_f64(r) == 0x1p-54);
}

TARGET("f16c") static void f16c(void)
{
	check_u64("F16C", (uint64_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(1.5f), 0)), 0x3e00);
}

TARGET("bmi,bmi2,lzcnt,popcnt") static void bits(void)
{
	volatile uint64_t x = 0x00f0123456789abc;

	check_u64("BMI2 pdep", _pdep_u64(0xabc, 0x0f0f0f0f), 0x0a0b0c);
	check_u64("BMI2 pext", _pext_u64(x, 0xff00ff00ff00ff00), 0x0012569a);
	check_u64("BMI1 andn", _andn_u64(x, ~0ull), ~x);
	check_u64("lzcnt", _lzcnt_u64(x), 8);
	check_u64("tzcnt", _tzcnt_u64(x), 2);
	check_u64("popcnt", (uint64_t)_mm_popcnt_u64(x), 26);
}

TARGET("aes") static __m128i next_key(__m128i key, __m128i assist)
{
	assist = _mm_shuffle_epi32(assist, 0xff);
	key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
	key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
	key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
	return _mm_xor_si128(key, assist);
}

TARGET("aes") static void aes(void)
{
	/* FIPS 197, C.1: AES-128 of 00112233.. under 00010203.. */
	static const uint8_t wanted[16] = { 0x69, 0xc4, 0xe0, 0xd8, 0x6a, 0x7b, 0x04, 0x30,
					    0xd8, 0xcd, 0xb7, 0x80, 0x70, 0xb4, 0xc5, 0x5a };
	uint8_t block[16], key_bytes[16];
	__m128i key, state;

	for (int i = 0; i < 16; i++) {
		block[i] = (uint8_t)(i * 0x11);
		key_bytes[i] = (uint8_t)i;
	}
	key = _mm_loadu_si128((__m128i *)key_bytes);
	state = _mm_xor_si128(_mm_loadu_si128((__m128i *)block), key);
#define ROUND(constant)                                                        \
	key = next_key(key, _mm_aeskeygenassist_si128(key, constant));         \
	state = constant == 0x36 ? _mm_aesenclast_si128(state, key)            \
				 : _mm_aesenc_si128(state, key)
	ROUND(0x01);
	ROUND(0x02);
	ROUND(0x04);
	ROUND(0x08);
	ROUND(0x10);
	ROUND(0x20);
	ROUND(0x40);
	ROUND(0x80);
	ROUND(0x1b);
	ROUND(0x36);
	_mm_storeu_si128((__m128i *)block, state);
	check_bytes("AES, FIPS 197 C.1", block, wanted, sizeof block);
}

TARGET("pclmul") static void pclmul(void)
{
	/* Carry-less: (2^63 + 1) squared is 2^126 + 1. */
	__m128i a = _mm_set_epi64x(0, (int64_t)0x8000000000000001);
	uint64_t out[2];

	_mm_storeu_si128((__m128i *)out, _mm_clmulepi64_si128(a, a, 0));
	check("PCLMULQDQ", out[0] == 1 && out[1] == 1ull << 62);
}

TARGET("sha,sse4.1") static void sha256(void)
{
	/* FIPS 180-4: the digest of "abc", one block. */
	static const uint32_t k[64] = {
		0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
		0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
		0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
		0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
		0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
		0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
		0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
		0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
		0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
		0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
		0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2
	};
	static const uint32_t start[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
					   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
	static const uint32_t wanted[8] = { 0xba7816bf, 0x8f01cfea, 0x414140de, 0x5dae2223,
					    0xb00361a3, 0x96177a9c, 0xb410ff61, 0xf20015ad };
	uint32_t w[64] = { 0x61626380, [15] = 24 }, out[8];
	__m128i abef = _mm_setr_epi32((int)start[5], (int)start[4], (int)start[1], (int)start[0]);
	__m128i cdgh = _mm_setr_epi32((int)start[7], (int)start[6], (int)start[3], (int)start[2]);

	for (int i = 16; i < 64; i += 4) {
		__m128i m = _mm_sha256msg1_epu32(_mm_loadu_si128((__m128i *)(w + i - 16)),
						 _mm_loadu_si128((__m128i *)(w + i - 12)));
		m = _mm_add_epi32(m, _mm_loadu_si128((__m128i *)(w + i - 7)));
		m = _mm_sha256msg2_epu32(m, _mm_loadu_si128((__m128i *)(w + i - 4)));
		_mm_storeu_si128((__m128i *)(w + i), m);
	}
	for (int i = 0; i < 64; i += 2) {
		__m128i wk = _mm_set_epi32(0, 0, (int)(w[i + 1] + k[i + 1]), (int)(w[i] + k[i]));
		__m128i next = _mm_sha256rnds2_epu32(cdgh, abef, wk);

		cdgh = abef;
		abef = next;
	}
	out[0] = start[0] + (uint32_t)_mm_extract_epi32(abef, 3);
	out[1] = start[1] + (uint32_t)_mm_extract_epi32(abef, 2);
	out[2] = start[2] + (uint32_t)_mm_extract_epi32(cdgh, 3);
	out[3] = start[3] + (uint32_t)_mm_extract_epi32(cdgh, 2);
	out[4] = start[4] + (uint32_t)_mm_extract_epi32(abef, 1);
	out[5] = start[5] + (uint32_t)_mm_extract_epi32(abef, 0);
	out[6] = start[6] + (uint32_t)_mm_extract_epi32(cdgh, 1);
	out[7] = start[7] + (uint32_t)_mm_extract_epi32(cdgh, 0);
	check_bytes("SHA-256, FIPS 180-4", out, wanted, sizeof out);
}

TARGET("rdrnd") static void rdrand(void)
{
	unsigned long long first = 0, second = 0;
	int ok = _rdrand64_step(&first) & _rdrand64_step(&second);

	check("RDRAND", ok && first != second);
}

/* Upper halves survive switches between processes only if XSAVE keeps them. */
TARGET("avx2") static void kept(void)
{
	__m256i value = _mm256_set1_epi64x(0x0123456789abcdef), now;
	uint64_t lanes[4];

	__asm__ volatile("vmovdqa %1, %%ymm15\n\t"
			 "mov $24, %%eax\n\t" /* sched_yield */
			 "syscall\n\t"
			 "vmovdqa %%ymm15, %0"
			 : "=x"(now)
			 : "x"(value)
			 : "rax", "rcx", "r11", "xmm15", "memory");
	_mm256_storeu_si256((__m256i *)lanes, now);
	check("YMM registers over a system call",
	      lanes[0] == 0x0123456789abcdef && lanes[3] == lanes[0]);
}

int main(void)
{
	unsigned a, b = 0, c = 0, d, leaf7_b = 0, leaf7_c, leaf7_d;

	__cpuid(1, a, b, c, d);
	__cpuid_count(7, 0, a, leaf7_b, leaf7_c, leaf7_d);
	sse2();
	if (__builtin_cpu_supports("sse4.1"))
		sse41();
	if (__builtin_cpu_supports("sse4.2"))
		sse42();
	if (__builtin_cpu_supports("avx"))
		avx();
	if (__builtin_cpu_supports("avx2")) {
		avx2();
		kept();
	}
	if (__builtin_cpu_supports("fma"))
		fma3();
	if (__builtin_cpu_supports("avx") && (c & bit_F16C))
		f16c();
	if (__builtin_cpu_supports("bmi2"))
		bits();
	if (c & bit_AES)
		aes();
	if (c & bit_PCLMUL)
		pclmul();
	if (leaf7_b & bit_SHA)
		sha256();
	if (c & bit_RDRND)
		rdrand();
	return finish("vectors");
}
